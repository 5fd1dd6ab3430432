"""Images: decoding, transforms, augmentation."""
