"""Mean and standard deviation of the pixels that CLIP was trained on: red, green and blue, as fractions of 255."""

Triple = tuple[float, float, float]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
