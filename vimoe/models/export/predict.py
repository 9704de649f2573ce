"""Name the classes of images with the exported model beside this file: python predict.py IMAGE..."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
HERE = Path(__file__).resolve().parent
SETTINGS = json.loads((HERE / "preprocessing.json").read_text(encoding="utf-8"))
LABELS = json.loads((HERE / "labels.json").read_text(encoding="utf-8"))["labels"]


def pixels(file: str) -> np.ndarray:
    """Return an image file as (channels, height, width), resized, cropped and normalised."""
    image: Image.Image = Image.open(file, formats=FORMATS)
    if "exif" in image.info:  # damaged metadata say nothing of the pixels; Pillow raises once, and then has no tags
        with suppress(Exception):
            image.getexif()
    ImageOps.exif_transpose(image, in_place=True)
    # convert would make white of all values above 255; Pillow has those of a PGM of 16 bits in 32
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        values = np.asarray(image).astype(np.uint32)
        values[values == image.info.get("transparency")] = 2**16 - 1
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"{file} has 32 bits a pixel, whose white level is unknown")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image, mean = image.convert("RGB"), np.array(SETTINGS["mean"], np.float32)
    height, width = SETTINGS["input_size"][1:]
    wide, high = (int(side / SETTINGS["crop_pct"]) for side in (width, height))
    if (mode := SETTINGS["crop_mode"] or "center") != "squash":  # the shorter side fits; with "border" the longer one
        half = 0.5 * (mode == "border" or height != width)  # where timm rounds; elsewhere it cuts
        if (image.width * high > image.height * wide) != (mode == "border"):
            wide = int(image.width * high / image.height + half)
        else:
            high = int(image.height * wide / image.width + half)
    image = image.resize((wide, high), Image.Resampling[SETTINGS["interpolation"].upper()])
    canvas = Image.new("RGB", (width, height), tuple(round(255 * float(value)) for value in mean))
    canvas.paste(image, (-round((wide - width) / 2), -round((high - height) / 2)))
    normal = (np.asarray(canvas, np.float32) / 255 - mean) / np.array(SETTINGS["std"], np.float32)
    return normal.transpose(2, 0, 1)


def probabilities(files: list[str], model: str = "model.onnx") -> np.ndarray:
    """Return (files, classes), the probability of each class."""
    session = onnxruntime.InferenceSession(HERE / model)
    logits = session.run(None, {"images": np.stack([pixels(file) for file in files])})[0]
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    return chances / chances.sum(axis=1, keepdims=True)


if __name__ == "__main__":
    files = sys.argv[1:] or sys.exit(__doc__)
    for name, row in zip(files, probabilities(files), strict=True):
        print(f"{name}: " + ", ".join(f"{LABELS[i]} {row[i]:.1%}" for i in np.argsort(-row)[:5]))
