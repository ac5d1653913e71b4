"""Small networks of our own: the shapes of code that real models have, in a few thousand weights.

Each takes what its entry in zoo.py makes. They are written as people write them, not as bnify
would like them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BertLike(nn.Module):
    """Embeddings, attention by hand with a mask, keyword inputs, a dataclass out."""

    @dataclass
    class Output:
        last_hidden_state: Tensor
        pooled: Tensor
        logits: Tensor | None = None

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.query = nn.Linear(width, width)
            self.key = nn.Linear(width, width)
            self.value = nn.Linear(width, width)
            self.out = nn.Linear(width, width)
            self.norm1 = nn.LayerNorm(width)
            self.up = nn.Linear(width, 4 * width)
            self.down = nn.Linear(4 * width, width)
            self.norm2 = nn.LayerNorm(width)
            self.dropout = nn.Dropout(0.1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            n, t, c = x.shape
            q, k, v = (
                layer(x).view(n, t, self.heads, c // self.heads).transpose(1, 2)
                for layer in (self.query, self.key, self.value)
            )
            scores = q @ k.transpose(-1, -2) / (c // self.heads) ** 0.5 + mask
            mixed = self.dropout(scores.softmax(-1)) @ v
            x = self.norm1(x + self.out(mixed.transpose(1, 2).reshape(n, t, c)))
            return self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2, vocab: int = 100) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width, padding_idx=0)
        self.positions = nn.Embedding(64, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(self.Block(width, heads) for _ in range(depth))
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 3)
        self.register_buffer("position_ids", torch.arange(64)[None], persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        x = self.tokens(input_ids) + self.positions(self.position_ids[:, : input_ids.shape[1]])
        x = self.norm(x)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -1e4
        for block in self.blocks:
            x = block(x, mask)
        pooled = torch.tanh(self.pooler(x[:, 0]))
        return self.Output(last_hidden_state=x, pooled=pooled, logits=self.classifier(pooled))


class GptLike(nn.Module):
    """Pre-norm blocks, one matrix for q, k and v, fused attention, output tied to the embedding."""

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.ln_1 = nn.LayerNorm(width)
            self.c_attn = nn.Linear(width, 3 * width)
            self.c_proj = nn.Linear(width, width)
            self.ln_2 = nn.LayerNorm(width)
            self.mlp = nn.Sequential(
                OrderedDict(
                    c_fc=nn.Linear(width, 4 * width),
                    gelu=nn.GELU(approximate="tanh"),
                    c_proj=nn.Linear(4 * width, width),
                    dropout=nn.Dropout(0.1),
                )
            )

        def forward(self, x: Tensor) -> Tensor:
            n, t, c = x.shape
            q, k, v = self.c_attn(self.ln_1(x)).split(c, dim=2)
            q, k, v = (z.view(n, t, self.heads, c // self.heads).transpose(1, 2) for z in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.c_proj(y.transpose(1, 2).contiguous().view(n, t, c))
            return x + self.mlp(self.ln_2(x))

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2, vocab: int = 100) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(64, width)
        self.h = nn.ModuleList(self.Block(width, heads) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> dict[str, Tensor]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return {"logits": self.lm_head(self.ln_f(x))}


class UNet(nn.Module):
    """Two levels, skip connections by concatenation, transposed convolutions; no norm at all."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.down1 = self.double(3, width)
        self.down2 = self.double(width, 2 * width)
        self.bottom = self.double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = self.double(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge1 = self.double(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def double(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.bottom(F.max_pool2d(two, 2))
        x = self.merge2(torch.cat([two, self.up2(x)], dim=1))
        x = self.merge1(torch.cat([one, self.up1(x)], dim=1))
        return self.head(x)


class LstmTagger(nn.Module):
    """Embedding, a bidirectional LSTM, a token head and a sentence head; two outputs."""

    def __init__(self, width: int = 16, vocab: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True, bidirectional=True)
        self.project = nn.Linear(2 * width, width)
        self.tags = nn.Linear(width, 5)
        self.hidden = nn.Linear(2 * width, width)
        self.sentence = nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x, (h, _) = self.lstm(self.embed(ids))
        last = torch.cat([h[-2], h[-1]], dim=1)
        return self.tags(F.relu(self.project(x))), self.sentence(F.relu(self.hidden(last)))


class GruTextCnn(nn.Module):
    """A GRU over Conv1d features, as in speech code, batch second."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(8, width, 5, padding=2)
        self.conv2 = nn.Conv1d(width, width, 3, padding=1, stride=2)
        self.gru = nn.GRU(width, width)
        self.fc = nn.Linear(width, width)
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        _, h = self.gru(x.permute(2, 0, 1))
        return self.out(F.leaky_relu(self.fc(h[-1]), 0.1))


class NestedOutputs(nn.Module):
    """A dict holding a list and a tuple; one tensor is handed out twice, one as a view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.box = nn.Conv2d(8, 4, 1)
        self.cls = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict:
        low = F.relu(self.stem(x))
        high = F.relu(self.body(F.avg_pool2d(low, 2)))
        box = self.box(high)
        return {
            "features": [low, high],
            "heads": (box, self.cls(high).flatten(2)),
            "box": box,
        }


class DataclassOutputs(nn.Module):
    """Returns a dataclass with a nested dict and a None."""

    @dataclass
    class Output:
        logits: Tensor
        extra: dict[str, Tensor]
        loss: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(12, 16)
        self.code = nn.Linear(16, 6)
        self.decode = nn.Linear(6, 12)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Output:
        code = torch.tanh(self.code(torch.relu(self.encode(x))))
        return self.Output(logits=self.head(code), extra={"code": code, "x": self.decode(code)})


class TwoInputs(nn.Module):
    """Positional image, keyword table and a flag: ``model(image, table=..., scale=2.0)``."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.table = nn.Linear(5, 8)
        self.mix = nn.Linear(16, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, image: Tensor, *, table: Tensor, scale: float = 1.0) -> Tensor:
        x = torch.cat([self.image(image).flatten(1), F.relu(self.table(table)) * scale], dim=1)
        return self.head(F.silu(self.mix(x)))


class Siamese(nn.Module):
    """One encoder called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head((self.encoder(left) - self.encoder(right)).abs())


class SqueezeExcite(nn.Module):
    """Conv net with a squeeze-and-excitation gate, hard activations, and no norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.squeeze = nn.Conv2d(width, 4, 1)
        self.excite = nn.Conv2d(4, width, 1)
        self.point = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        x = F.relu6(self.depthwise(x))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.relu(self.point(x * gate))
        return self.head(x.mean((2, 3)))


class PlainResidual(nn.Module):
    """Residual blocks without norms, in-place activations and an in-place add."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(width, width, 3, padding=1)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv2(F.relu_(self.conv1(x)))
            y += x
            return F.relu_(y)

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(self.Block(width) for _ in range(depth)))
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.stem(x))).mean((-2, -1)))


class PreActivation(nn.Module):
    """ResNet-v2 order: norm, activation, convolution, add."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth)
        )
        self.last = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(F.relu(norm(x)))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


class ConvAutoencoder(nn.Module):
    """Strided convolutions down, transposed ones up, sigmoid out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.ELU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ELU()
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 4, 2, 1, groups=2),
            nn.ELU(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(self.encoder(x)))


class Video(nn.Module):
    """Conv3d with pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(2, 6, 3, padding=1)
        self.conv2 = nn.Conv3d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.conv1(x)), 2)
        return self.fc(F.relu(self.conv2(x)).flatten(2).mean(2))


class Parametrized(nn.Module):
    """Weight norm and spectral norm on ordinary layers."""

    def __init__(self) -> None:
        super().__init__()
        from torch.nn.utils.parametrizations import spectral_norm, weight_norm

        self.conv = weight_norm(nn.Conv1d(4, 8, 3, padding=1))
        self.mid = spectral_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(F.relu(self.conv(x)).mean(2))))


class TorchTransformer(nn.Module):
    """nn.TransformerEncoder, whose fused path reads the weights itself in eval."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.embed = nn.Linear(6, width)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(F.relu(self.embed(x))).mean(1))


class CrossAttention(nn.Module):
    """nn.MultiheadAttention beside plain layers: its out_proj is never called."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.fc = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.embed(x))
        y, weights = self.attention(x, x, x)
        return self.head(torch.relu(self.fc(y.mean(1)))), weights


class Mixer(nn.Module):
    """Token mixing by transposes: Linear on tokens and on channels."""

    def __init__(self, tokens: int = 9, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens1, self.tokens2 = nn.Linear(tokens, 8), nn.Linear(8, tokens)
        self.channels1, self.channels2 = nn.Linear(width, 32), nn.Linear(32, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        mixed = self.tokens2(F.gelu(self.tokens1(self.norm1(x).transpose(1, 2))))
        x = x + mixed.transpose(1, 2)
        x = x + self.channels2(F.gelu(self.channels1(self.norm2(x))))
        return self.head(x.mean(1))


class FunctionalWeights(nn.Module):
    """Layers used through ``F`` with their weights, bare parameters, and a shape that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(8, 6) / 6**0.5)
        self.bias = nn.Parameter(torch.zeros(8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.conv.weight, self.conv.bias, padding=1))
        x = x.view(x.shape[0], x.shape[1], -1).mean(-1)
        return self.head(F.relu(F.linear(x, self.weight, self.bias)))
