"""Where data come from: files and which split they belong to, images, class names, texts."""
