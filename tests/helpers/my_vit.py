"""A newcomer's backbone in one file: a ViT of plain torch, the class of its FFNs, and the family that vimoe asks."""

from torch import Tensor, nn, randn

from vimoe.config.model import FAMILIES
from vimoe.models.interface import Backbone
from vimoe.moe.ffn import KINDS, Kind
from vimoe.moe.router import TokenLayout


class FeedForward(nn.Sequential): ...


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.ffn = FeedForward(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.ffn(self.norms[1](x))


class MyViT(nn.Module):
    def __init__(self, num_classes: int = 10, size: int = 8, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.arguments = {"num_classes": num_classes, "size": size, "width": width, "depth": depth}
        self.num_classes, self.width = num_classes, width
        self.input_size, self.num_patches = (3, size, size), (size // 4) ** 2
        self.stem = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.positions = nn.Parameter(randn(1, 1 + self.num_patches, width))  # the first is the class token
        self.encoder = nn.Sequential(*(Layer(width) for _ in range(depth)))
        self.norm, self.classify = nn.LayerNorm(width), nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = nn.functional.pad(self.stem(images).flatten(2).transpose(1, 2), (0, 0, 1, 0)) + self.positions
        return {"scores": self.classify(self.norm(self.encoder(x))[:, 0])}


class MyFamily(Backbone):
    models, build, holder, layout = (MyViT,), MyViT, "encoder", TokenLayout(num_prefix_tokens=1, class_token=True)
    arguments = property(lambda self: self.vit.arguments)
    width = property(lambda self: self.vit.width)
    num_patches = property(lambda self: self.vit.num_patches)
    input_size = property(lambda self: self.vit.input_size)
    classifiers = property(lambda self: (self.vit.classify,))

    @classmethod
    def create(cls, name: str, *, num_classes: int | None, img_size: int | None, **_: object) -> nn.Module:
        return MyViT(10 if num_classes is None else num_classes, img_size or 8)

    def logits(self, output: dict[str, Tensor]) -> Tensor:
        return output["scores"]


FAMILIES["mine"] = MyFamily
KINDS[FeedForward] = Kind(fc1=("0",), fc2="2", act="1")
