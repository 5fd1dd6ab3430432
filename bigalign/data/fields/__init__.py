"""What a sample has besides an image and a text: more texts, teachers, views, columns."""
