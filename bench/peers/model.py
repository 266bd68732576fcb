"""The models of microbatch/models in PyTorch: the same structure, parameters and initial distribution.

The llama is that of Hugging Face's transformers.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expansion, self.contraction = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        samples, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(width, dim=2)
        q, k, v = (t.view(samples, length, self.heads, width // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).reshape(samples, length, width))
        return x + self.contraction(F.gelu(self.expansion(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, layers=4, heads=4, width=128, length=64, vocabulary=256):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue
            if parameter.dim() < 2:
                nn.init.zeros_(parameter)
            else:
                ends_in_residual = "projection" in name or "contraction" in name
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if ends_in_residual else 0.02)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Llama(nn.Module):
    def __init__(self, layers=9, heads=6, kv_heads=3, width=384, inner=1024, length=256, vocabulary=256):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocabulary, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
            hidden_size=width, intermediate_size=inner, max_position_embeddings=length, tie_word_embeddings=True,
            initializer_range=0.02))
        for name, parameter in self.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, tokens):
        return self.model(input_ids=tokens, use_cache=False).logits


def convolution(inputs, outputs, kernel, stride):
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.GroupNorm(8, outputs))


class ResidualBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.residual = nn.Sequential(
            convolution(inputs, outputs, 3, stride), nn.ReLU(), convolution(outputs, outputs, 3, 1))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x):
        return F.relu(self.residual(x) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, width=16, blocks=2, channels=1, classes=10):
        super().__init__()
        self.stem = nn.Sequential(convolution(channels, width, 3, 1), nn.ReLU())
        widths = [width << stage for stage in range(3) for _ in range(blocks)]
        self.blocks = nn.Sequential(*(
            ResidualBlock(inputs, outputs, 2 if inputs < outputs else 1)
            for inputs, outputs in zip([width, *widths], widths)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images):
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def loss_of(model, inputs, labels):
    logits = model(inputs)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))
