"""One set of photographs in four renderings, so that a model trained on three can be tested on the fourth.

    python studies/renderings.py photos/ --out domains/ --held_out posterised

`photos/` holds `train/<class>/` and `test/<class>/`, as `vimoe train --data.path` takes it, and so does OUT. There each
train image of a class is in one of the three other renderings, in turn by name, so no photograph is seen twice: the
domains differ in their images too, as they do in PACS or DomainNet (Li et al., arXiv 1710.03077; Peng et al., arXiv
1812.01754). All test images are in the rendering that is held out. With `--held_out none` none is, and test images are
in one of all four, too.

With `--apart` each rendering has a folder of its own in place of `train/`, as a split of the data: `vimoe train
--data.train_split photograph+edges+inverted` reads them all, and `--data.tasks splits` one after the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

from vimoe.data.image_files import find_images
from vimoe.data.images import open_image
from vimoe.files import temporary_folder


def photograph(image: Image.Image) -> Image.Image:
    """Return the image as it is."""
    return image


def edges(image: Image.Image) -> Image.Image:
    """Return dark lines on white, where the brightness changes: a drawing."""
    lines = ImageOps.grayscale(image).filter(ImageFilter.SMOOTH).filter(ImageFilter.FIND_EDGES)
    whole = ImageOps.crop(lines, border=1).resize(image.size)  # the filter leaves a frame as it was
    return ImageOps.invert(ImageOps.autocontrast(whole, cutoff=(0, 1))).convert("RGB")


def posterised(image: Image.Image) -> Image.Image:
    """Return four levels of grey: a print."""
    return ImageOps.posterize(ImageOps.autocontrast(ImageOps.grayscale(image)), bits=2).convert("RGB")


def inverted(image: Image.Image) -> Image.Image:
    """Return the negative, out of focus by a hundredth of the shorter side."""
    return ImageOps.invert(image.filter(ImageFilter.GaussianBlur(min(image.size) / 100)))


RENDERINGS: dict[str, Callable[[Image.Image], Image.Image]] = {
    each.__name__: each for each in (photograph, edges, posterised, inverted)
}


def write(photos: Path, out: Path, held_out: str, apart: bool = False, classes: int | None = None) -> None:
    """Write the folders of train and test; `out` appears once it is whole.

    Args:
        photos: folder with train/<class>/ and test/<class>/.
        out: new folder.
        held_out: name of the rendering of all test images, or "none".
        apart: a folder for the train images of each rendering.
        classes: number of classes, taken at equal distances in the order of their names; by default all.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(out.parent) as unfinished:
        _fill(unfinished, photos, held_out, apart, classes)
        unfinished.rename(out)


def _fill(out: Path, photos: Path, held_out: str, apart: bool, classes: int | None) -> None:
    seen = [name for name in RENDERINGS if name != held_out]
    for part, names in (("train", seen), ("test", [held_out] if held_out in RENDERINGS else seen)):
        folders = sorted(path for path in (photos / part).iterdir() if path.is_dir())
        count = classes or len(folders)
        for folder in (folders[number * len(folders) // count] for number in range(count)):
            for position, path in enumerate(find_images(folder)[0]):
                name = names[position % len(names)]
                target = out / (name if apart and part == "train" else part) / folder.name
                target.mkdir(parents=True, exist_ok=True)
                RENDERINGS[name](open_image(path)).save(target / f"{path.stem}-{name}.png")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--held_out", choices=[*RENDERINGS, "none"], default="posterised", help="of the test images")
    parser.add_argument("--apart", action="store_true", help="write a folder for each rendering in place of train/")
    parser.add_argument("--classes", type=int, help="number of classes (default: all)")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"--out={args.out} exists: name another folder, or remove it")
    write(args.photos, args.out, args.held_out, args.apart, args.classes)


if __name__ == "__main__":
    main()
