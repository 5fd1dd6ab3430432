"""What filters look at: one row of columns per sample, in the order of the samples of a shard.

`bigalign index --stats` writes, beside the index, one file per shard: a numpy structured array [N]
(.npy, little-endian, no pickle) whose row i belongs to sample i of the shard.

  bigalign.stats/00000.tar.STAMP.npy   STAMP: 16 hex digits, the time stamp of the shard in the
                                       index. A shard that changed has no stats until they are
                                       written again.

  image_bytes      uint32          size of the image member; 0: the sample has no image
  width, height    uint32          pixels, from the header of the image; 0: no JPEG, PNG, GIF, WebP,
                                   BMP header was found
  sha256           uint8 [32]      of the bytes of the image member, as img2dataset computes it
  length.FIELD     uint32          characters of the first caption of a caption field ("txt",
                                   "json.caption", as in WebDataset), stripped; 0: none
  json.KEY         float64         each number or boolean at the top of the .json members, NaN where
                                   a sample has none; the keys are those of the shard, sorted

`WebDataset.columns()` gives these arrays, mapped into memory, shard by shard in the order of the
source. Shards may differ in their json.KEY columns, not in the others.
"""
