"""Models as people bring them, each with a ragged batch and a loss: small, made from their configuration."""

import torch
from torch import nn
from torch.nn import functional

import microbatch as mb

VOCABULARY, LONGEST, SAMPLES = 96, 12, 8


def ragged(seed=1, samples=SAMPLES, longest=LONGEST, vocabulary=VOCABULARY):
    """Token ids with trailing padding, its mask, and labels of which padding does not count."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (samples,), generator=generator)
    lengths[0] = longest
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    ids = torch.randint(5, vocabulary, (samples, longest), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def classified(seed=1, classes=3):
    batch = ragged(seed)
    batch["labels"] = torch.arange(SAMPLES) % classes
    return batch


def _small(config, **more):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 32}
    return config(**(sizes | more))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(config), ragged(), mb.losses.causal_lm


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(_small(LlamaConfig, num_key_value_heads=1)), ragged(), mb.losses.causal_lm


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = _small(Qwen2Config, num_key_value_heads=1, tie_word_embeddings=True)
    return Qwen2ForCausalLM(config), ragged(), mb.losses.causal_lm


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(_small(MistralConfig, num_key_value_heads=1)), ragged(), mb.losses.causal_lm


def bert():
    from transformers import BertConfig, BertForMaskedLM

    config = _small(BertConfig, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForMaskedLM(config), ragged(), mb.losses.masked_lm


def bert_classifier():
    from transformers import BertConfig, BertForSequenceClassification

    config = _small(BertConfig, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
    return BertForSequenceClassification(config), classified(), mb.losses.sequence_classification


def roberta():
    from transformers import RobertaConfig, RobertaForTokenClassification

    config = _small(RobertaConfig, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=4)
    batch = ragged()
    batch["labels"] = (batch["input_ids"] % 4).masked_fill(batch["attention_mask"] == 0, -100)
    return RobertaForTokenClassification(config), batch, mb.losses.token_classification


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
                      decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), ragged(), mb.losses.seq2seq_lm


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16,
                       patch_size=8, num_channels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                       num_labels=3)
    batch = {"pixel_values": torch.randn(SAMPLES, 3, 16, 16), "labels": torch.arange(SAMPLES) % 3}
    return ViTForImageClassification(config), batch, mb.losses.image_classification


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2,
                           encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
                           num_mel_bins=8, max_source_positions=10, max_target_positions=32, dropout=0.0,
                           pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    batch = {"input_features": torch.randn(SAMPLES, 8, 20), "labels": ragged()["labels"]}
    return WhisperForConditionalGeneration(config), batch, mb.losses.seq2seq_lm


def mlp():
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    return model, (torch.randn(SAMPLES, 6), torch.arange(SAMPLES) % 3), mb.losses.image_classification


class _Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells = kind(5, 7, num_layers=2, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


def lstm():
    return _Recurrent(nn.LSTM), (torch.randn(SAMPLES, 4, 5), torch.arange(SAMPLES) % 3), mb.losses.image_classification


def gru():
    return _Recurrent(nn.GRU), (torch.randn(SAMPLES, 4, 5), torch.arange(SAMPLES) % 3), mb.losses.image_classification


class _Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x, noise):
        mean, log_variance = self.encoder(x).chunk(2, -1)
        return self.decoder(mean + (0.5 * log_variance).exp() * noise), mean, log_variance


def vae():
    def loss(model, micro):
        found, mean, log_variance = model(micro["x"], micro["noise"])
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        return functional.mse_loss(found, micro["x"], reduction="sum") + divergence, len(found)

    return _Vae(), {"x": torch.randn(SAMPLES, 6), "noise": torch.randn(SAMPLES, 2)}, loss


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x.square() * gradient


class _Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.second.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.second(_Cube.apply(self.first(x)))


def custom_function():
    return _Custom(), (torch.randn(SAMPLES, 6), torch.arange(SAMPLES) % 3), mb.losses.image_classification


def lora():
    from peft import LoraConfig, get_peft_model

    model, batch, loss = gpt2()
    adapted = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, one in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(one, std=0.1)  # zeros have no gradient to compare
    return adapted, batch, loss


def gan():
    """The generator's step, through a discriminator that is frozen."""
    generator, discriminator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6)), nn.Linear(6, 1)
    discriminator.requires_grad_(False)

    def loss(model, micro):
        return functional.softplus(-discriminator(model(micro["noise"]))).sum(), len(micro["noise"])

    return generator, {"noise": torch.randn(SAMPLES, 3)}, loss


def compiled():
    model, batch, loss = mlp()
    return torch.compile(model), batch, loss


def clip():
    """Pairs of image and text, each pulled together: without the contrast, which is of the batch."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "eos_token_id": 2}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    batch = {"pixel_values": torch.randn(SAMPLES, 3, 16, 16)} | {k: v for k, v in ragged().items() if k != "labels"}

    def loss(model, micro):
        found = model(**micro)
        return (1 - (found.image_embeds * found.text_embeds).sum(-1)).sum(), len(found.image_embeds)

    return model, batch, loss


def mixtral():
    """Mixture of experts, without the loss that balances them, which is of the batch."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = _small(MixtralConfig, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(config), ragged(), mb.losses.causal_lm


EXACT = {one.__name__: one for one in (gpt2, llama, qwen2, mistral, bert, bert_classifier, roberta, t5, vit, clip, whisper,
                                       mixtral, mlp, lstm, gru, vae, custom_function, lora, gan, compiled)}


# The loss of a sample depends on others of its micro-batch: verify() says so.


def convnet():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 14 * 14, 3))
    return model, (torch.randn(SAMPLES, 3, 16, 16), torch.arange(SAMPLES) % 3), mb.losses.image_classification


def clip_contrast():
    model, batch, _ = clip()
    return model, batch, lambda model, micro: (model(**micro, return_loss=True).loss * len(micro["input_ids"]),
                                               len(micro["input_ids"]))


def mixtral_balance():
    model, batch, _ = mixtral()
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 1.0

    def loss(model, micro):
        weight = int((micro["labels"][:, 1:] != -100).sum())
        return model(**micro, output_router_logits=True).loss * weight, weight

    return model, batch, loss


OF_THE_BATCH = {"convnet": (convnet, "batch_statistics"), "clip_contrast": (clip_contrast, "coupled_samples"),
                "mixtral_balance": (mixtral_balance, "coupled_samples")}
