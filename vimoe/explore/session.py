"""Values that the explorer shows of a run: an image's prediction and routes, and what experts see most.

Axes: I validation images, N experts of a layer, K chosen ones.
"""

from __future__ import annotations

import base64
import io
import math
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from vimoe.config.masks import Colour
from vimoe.data.images import image_size, open_image
from vimoe.data.loaders import eval_loader, preprocessing
from vimoe.data.mask_colours import spread_colours
from vimoe.errors import ConfigError, VimoeError
from vimoe.experiments.finished_run import FinishedRun
from vimoe.explore.overrule import ROUTED, overruled, switches
from vimoe.files import temporary_folder
from vimoe.models.interface import label_names
from vimoe.moe import Routing, record
from vimoe.moe.layer import moe_layers
from vimoe.run_folder import open_run
from vimoe.tasks.base import task_class

THUMBNAIL = 144  # pixels of its longer side
LONGEST = 1024  # pixels of a side of a scene; the attention over a photograph of 12 megapixels would take an hour
SEEN = 512  # pixels of the longer side of an image that is looked at
TOP = 5  # classes that are named
NEAREST = 8  # images beside the one that is looked at
SEEN_MOST = 12  # images of an expert


class Session:
    """A finished run that is looked at, with some of its validation images. One thread at a time computes.

    Args:
        path: run folder, with MoE layers.
        images: largest number of validation images, evenly spread over all.

    Raises:
        ConfigError: if the model has no MoE layer.
    """

    def __init__(self, path: str | Path, images: int = 200) -> None:
        whole = task_class(open_run(path).settings).writes_predictions  # masks of an image in one piece, as are routes
        self.run = FinishedRun(path, "whole" if whole else None)
        self.model = self.run.model.eval()
        self.layers = moe_layers(self.model)
        if not self.layers:
            raise ConfigError(f"{path} has no MoE layer: expected one to explore; name a run with some")
        self._whole = whole
        self._lock, self._closing = threading.Lock(), ExitStack()
        self._folder = self._closing.enter_context(temporary_folder(Path(tempfile.gettempdir())))
        self._folder.chmod(0o700)  # it has the user's images
        self._draw = torch.Generator().manual_seed(0)
        found = self.run.data.val
        chosen = [found[i * len(found) // min(images, len(found))] for i in range(min(images, len(found)))]
        self.files = [self._kept(index, sample[0]) for index, sample in enumerate(chosen)]
        names = label_names(self.model)
        self.colours = dict(zip(names, self._palette(len(names)), strict=True)) if whole else {}
        self.labels = [names[label] if isinstance(label, int) else None for _, label in chosen]
        self.predicted, self.routes = self._look(self.files, {})

    def close(self) -> None:
        """Delete the copies of the images."""
        self._closing.close()

    def state(self) -> dict[str, Any]:
        """Return what a page needs to begin: layers, images, what each expert sees most, and colours of classes.

        Layers have their switches, and classes of masks their colours.
        """
        layers = [{"name": name, "experts": layer.config.num_experts, "routing": layer.config.routing,
                   "switches": switches(layer)} for name, layer in self.layers.items()]  # fmt: skip
        images = [
            {"id": index, "label": label, "predicted": _first(predicted)}
            for index, (label, predicted) in enumerate(zip(self.labels, self.predicted, strict=True))
        ]
        return {
            "run": self.run.run.path.name, "layers": layers, "images": images, "seen_most": self._seen_most(),
            "colours": {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in self.colours.items()},
        }  # fmt: skip

    def thumbnail(self, index: int) -> bytes:
        """Return a validation image as a small JPEG."""
        return _small(open_image(self.files[index]), THUMBNAIL)

    def look(self, image: int | bytes, asked: Mapping[str, str]) -> dict[str, Any]:
        """Return what the model sees in an image, as it is and with layers overruled.

        Args:
            image: index of a validation image, or the content of an image file.
            asked: switch by layer name (`vimoe.explore.overrule.switches`).

        Returns:
            {"plain", "overruled": None if nothing is asked, "nearest": indices of validation images, "seen": the image
            as the model sees it, resized and cropped, as a data URI}. The first two have "prediction" (see
            `Task.predict`; a mask as a data URI, "picture") and "layers", by name. A layer that routes images has
            "chosen", pairs [expert, gate] without gates of zero. One that routes tokens has "map", rows of the first
            expert of each patch, -1 for none, and "extent", the size of the map in widths and heights of the image: a
            model pads some images.

        Raises:
            VimoeError: if the image cannot be read, or a switch is none.
        """
        asked = {name: what for name, what in asked.items() if what != ROUTED}
        with self._lock, temporary_folder(self._folder) as folder:
            file = self._file(image, folder)
            plain, routes = self._look([file], {}, folder)
            found: dict[str, Any] = {"plain": self._shown(plain[0], routes, file), "overruled": None}
            found |= {"nearest": self._nearest(routes, image), "seen": self._seen(file)}
            if asked:
                found["overruled"] = self._overruled(file, asked, folder)
        return found

    def overruled(self, index: int, asked: Mapping[str, str]) -> dict[str, Any]:
        """Return what `look` has as "overruled", of a validation image."""
        with self._lock, temporary_folder(self._folder) as folder:
            return self._overruled(self._file(index, folder), asked, folder)

    def _overruled(self, file: Path, asked: Mapping[str, str], folder: Path) -> dict[str, Any]:
        predictions, routes = self._look([file], asked, folder)
        return self._shown(predictions[0], routes, file)

    def _file(self, image: int | bytes, folder: Path) -> Path:
        if isinstance(image, int):
            if not 0 <= image < len(self.files):
                raise VimoeError(f"image {image}: expected 0 to {len(self.files) - 1}")
            return self.files[image]
        file = folder / "image"
        file.write_bytes(image)
        try:
            return self._bounded(open_image(file), file)
        except VimoeError as error:
            raise VimoeError(str(error).replace(str(file), "this file")) from error

    def _kept(self, index: int, source: Any) -> Path:
        """Write a validation image to a file of its own, whatever it is read from, and return its path."""
        path, image = self._folder / f"{index}.png", open_image(source)
        image.save(path)
        return self._bounded(image, path)

    def _bounded(self, image: Image.Image, path: Path) -> Path:
        """Write the image of a file that is too large to be segmented in one piece smaller, and return its path."""
        if self._whole and max(image.size) > LONGEST:
            image.thumbnail((LONGEST, LONGEST), Image.Resampling.BICUBIC)
            image.save(path, "PNG")
        return path

    def _look(
        self, files: Sequence[Path], asked: Mapping[str, str], out: Path | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, list[Routing]]]:
        """Return predictions of files, and by layer the decisions for each."""
        task = self.run.task
        folder = (out or self._folder) / "masks" if task.writes_predictions else None
        with torch.no_grad(), overruled(self.model, asked, self._of_others), record(self.model) as routings:
            predictions = task.predict(self.model, files, folder, TOP)
        routes: dict[str, list[Routing]] = {name: [] for name in self.layers}
        for routing in routings:
            routes[routing.layer] += _by_image(routing)
        return predictions, routes

    def _of_others(self, name: str, routing: Routing) -> Routing:
        """Return the decisions of another validation image, drawn at random; tokens of a kind change places."""
        if routing.unit == "token":
            order = torch.randperm(len(routing.experts), generator=self._draw).to(routing.experts.device)
            if routing.kinds is not None:
                places = routing.kinds.argsort(stable=True)  # the first kind's, then the next one's
                order = torch.empty_like(order).scatter(0, places, order[routing.kinds[order].argsort(stable=True)])
            return replace(routing, experts=routing.experts[order], gates=routing.gates[order])
        drawn = int(torch.randint(len(self.files), (1,), generator=self._draw))
        other = self.routes[name][drawn]
        device, count = routing.experts.device, len(routing.experts)
        return replace(
            routing, experts=other.experts.to(device).expand(count, -1), gates=other.gates.to(device).expand(count, -1)
        )

    def _shown(self, prediction: dict[str, Any], routes: Mapping[str, list[Routing]], file: Path) -> dict[str, Any]:
        shown = {name: value for name, value in prediction.items() if name not in ("file", "mask", "overlay")}
        if "overlay" in prediction:
            overlay = open_image(Path(prediction["overlay"]))  # of PNGs a static page of scenes would have 40 MB
            shown["picture"] = data_uri(_small(overlay, SEEN), "jpeg")
        return {
            "prediction": shown,
            "layers": {name: self._chosen(name, own, file) for name, (own, *_) in routes.items()},
        }

    def _chosen(self, name: str, routing: Routing, file: Path) -> dict[str, Any]:
        """Return the experts of an image with their gates, or the first expert of each of its patches in rows."""
        if routing.unit == "image":
            pairs = zip(routing.experts[0].tolist(), routing.gates[0].tolist(), strict=True)
            return {"chosen": [[expert, gate] for expert, gate in pairs if expert >= 0 and gate != 0]}
        prefix = self.layers[name].router.layout.num_prefix_tokens
        first = routing.experts[prefix:, 0].where(routing.gates[prefix:, 0] != 0, -1)
        if not len(first):  # the last block of a classifier computes the tokens that its head reads alone
            return {"map": []}
        (rows, columns), (height, width) = self._patches(file, len(first))
        shown = first.view(rows, columns)[: math.ceil(height), : math.ceil(width)]  # the rest is padding
        return {"map": shown.tolist(), "extent": [shown.shape[1] / width, shown.shape[0] / height]}

    def _patches(self, file: Path, count: int) -> tuple[tuple[int, int], tuple[float, float]]:
        """Return (rows, columns) of the patches of an image, and its height and width in patches."""
        if self._whole:
            model: Any = self.model
            height, width = image_size(file)
            patch_h, patch_w = model.patch_size
            return model.grid(height, width), (height / patch_h, width / patch_w)
        height, width = preprocessing(self.model)["input_size"][1:]
        rows = round(math.sqrt(count * height / width))
        return (rows, count // rows), (rows, count // rows)

    def _seen(self, file: Path) -> str:
        """Return an image as the model sees it, as a data URI."""
        image = open_image(file)
        if not self._whole:
            prepared = preprocessing(self.model)
            mean, std = (torch.tensor(prepared[key])[:, None, None] for key in ("mean", "std"))
            pixels, _ = next(iter(eval_loader([(file, 0)], prepared, 1, 0)))
            image = to_pil_image((pixels[0] * std + mean).clamp(0, 1))
        return data_uri(_small(image, SEEN), "jpeg")

    def _palette(self, classes: int) -> Sequence[Colour]:
        """Return the colours that masks are drawn in."""
        palette: Sequence[Colour] | None = getattr(self.model, "palette", None)
        return palette or spread_colours(classes)

    def _seen_most(self) -> dict[str, list[list[int]]]:
        """Return for each layer and expert the images with the largest share of it, the largest first."""
        found = {}
        for name, layer in self.layers.items():
            shares_IN = torch.stack([_share(each) for each in self.routes[name]])
            best = shares_IN.sort(dim=0, descending=True, stable=True)
            found[name] = [
                [int(i) for i, share in zip(best.indices[:, e], best.values[:, e], strict=True) if share > 0][
                    :SEEN_MOST
                ]
                for e in range(layer.config.num_experts)
            ]
        return found

    def _nearest(self, routes: Mapping[str, list[Routing]], image: int | bytes) -> list[int]:
        """Return the validation images whose routes are nearest, by the shares of the experts of all layers."""
        far = torch.zeros(len(self.files))
        for name, (own, *_) in routes.items():
            far += (torch.stack([_share(each) for each in self.routes[name]]) - _share(own)).abs().sum(dim=1)
        order = far.argsort(stable=True).tolist()
        return [index for index in order if index != image][:NEAREST]


def _by_image(routing: Routing) -> list[Routing]:
    """Divide the decisions for a batch into those for each image, on the CPU."""
    count, tokens = routing.batch
    rows = len(routing.experts) // count
    parts = (part.detach().cpu().split(rows) for part in (routing.logits, routing.gates, routing.experts))
    return [
        replace(routing, logits=logits, gates=gates, experts=experts, batch=(1, tokens), outputs=None, kinds=None)
        for logits, gates, experts in zip(*parts, strict=True)
    ]


def _share(routing: Routing) -> Tensor:
    """(N,) share of each expert in an image: the mean over its units of the gates of those that were chosen."""
    return routing.expert_gates.float().mean(dim=0)


def _first(prediction: dict[str, Any]) -> str | None:
    """Return the best class of a prediction: the most likely, or that of most pixels."""
    if classes := prediction.get("classes"):
        return str(classes[0]["name"])
    return next(iter(prediction.get("areas", {})), None)


def _small(image: Image.Image, side: int) -> bytes:
    """Return an image as a JPEG with at most that many pixels a side."""
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Return a picture as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
