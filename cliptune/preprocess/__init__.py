"""From the bytes of an image file to pixels, from a caption to tokens; exact and fast on the CPU."""
