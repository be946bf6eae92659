"""What fills a graph's inputs where windows of text don't: arrays, images, sounds, single documents."""
