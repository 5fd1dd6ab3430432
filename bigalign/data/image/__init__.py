"""Images: decoding, transforms, augmentation, patches."""
