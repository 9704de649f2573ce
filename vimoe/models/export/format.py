"""The contract of a file format: a program becomes a file, and the file a function of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor
from torch.export import ExportedProgram

from vimoe.errors import ConfigError

Forward = Callable[[Tensor], Tensor]


class Format:
    """A format of exported models: a subclass, and an entry in `vimoe.config.export.FORMATS`.

    Attributes:
        file: name of the file in the exported folder.
        needs: modules outside of vimoe's own requirements that it imports.
        int8_file: name of the file with int8 weights; None for a format that cannot have one.
        script: name of a script beside this module that is put beside the file; None for no script.
    """

    file: str
    needs: Sequence[str] = ()
    int8_file: str | None = None
    script: str | None = None

    def check(self, name: str, int8: bool) -> None:
        """Raise ConfigError for a module that is not installed, or for int8 weights that the format cannot have.

        Args:
            name: name of the format, as the user gave it.
            int8: True if int8 weights are asked for.
        """
        if missing := [module for module in self.needs if find_spec(module) is None]:
            raise ConfigError(
                f"format={name!r} needs {', '.join(self.needs)}, and {missing[0]} is not installed: "
                f'pip install "vimoe[export]"'
            )
        if int8 and self.int8_file is None:
            raise ConfigError(f"int8=True with format={name!r}: expected format='onnx', which has int8 weights; set it")

    def write(self, program: ExportedProgram, path: Path) -> None:
        """Write a program, of torch's own operators alone, whose input is images (B, channels, height, width)."""
        raise NotImplementedError

    def load(self, path: Path, weights: Mapping[str, Tensor] | None = None) -> Forward:
        """Return the function of images (B, channels, height, width) that a file computes, on the CPU.

        Args:
            path: the file.
            weights: values to compute with in place of the file's own, by their names in the model.

        Raises:
            KeyError: if the file has no weight of a name.
        """
        raise NotImplementedError

    def quantize(self, source: Path, path: Path) -> None:
        """Write a file again, with int8 weights."""
        raise NotImplementedError
