"""Optimized models compute what they computed before, and nobody can tell from outside."""

import copy
import io
import pickle

import models
import pytest
import torch
from conftest import gradients, relative_difference
from torch import nn

import microbatch as mb

LONGEST = 24


def _wide(name, **changes):
    """As models.py, but wide enough that rows are no multiple of a vector, and heads share keys."""
    from transformers import AutoConfig, BertForMaskedLM, GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM
    from transformers import Qwen2ForCausalLM

    sizes = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 70, "max_position_embeddings": 64}
    if name == "gpt2":
        sizes = {"vocab_size": 101, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0,
                 "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    elif name == "bert":
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    else:
        sizes |= {"num_key_value_heads": 2}
    kind = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "bert": BertForMaskedLM,
            "mistral": MistralForCausalLM}[name]
    model = kind(AutoConfig.for_model(name, **(sizes | changes)))
    with torch.no_grad():
        for one in model.parameters():  # no bias of 0 and no scale of 1, in whose place another one would do
            one.add_(torch.randn_like(one) * 0.05)
    return model


def _loss(name):
    return mb.losses.masked_lm if name == "bert" else mb.losses.causal_lm


def _batch(padded):
    batch = models.ragged(longest=LONGEST, vocabulary=101, samples=4)
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        batch["labels"] = batch["input_ids"] = torch.randint(5, 101, (4, LONGEST))
    return batch


def _mean_gradients(model, batch, loss):
    total, weight = loss(model, batch)
    (total / weight).backward()
    found = gradients(model)
    model.zero_grad()
    return found, float(total.detach() / weight)


def _fused_nodes(output):
    """Names of the operations in the graph that are the library's."""
    seen, left, names = set(), [output.grad_fn], []
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        left += [one for one, _ in node.next_functions]
    return [name for name in names if "Fused" in name or "AtOnce" in name]


def _blocks(output):
    """How many blocks, or for BERT their attention, ran as one operation."""
    return len([one for one in _fused_nodes(output) if any(kind in one for kind in ("Block", "Llama", "Attention"))])


KNOWN = ["gpt2", "llama", "qwen2", "mistral", "bert"]
CAUSAL = KNOWN[:4]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_loss_and_gradient_are_those_of_the_model_itself(name, padded):
    model, batch, loss = _wide(name), _batch(padded), _loss(name)
    expected, value = _mean_gradients(model, batch, loss)
    with mb.optimize(model):
        assert _blocks(loss(model, batch)[0]) == _blocks(model.train()(**batch).loss) == 2
        found, ours = _mean_gradients(model, batch, loss)
    # Two ways of rounding the same sums of at most some hundred numbers in float32.
    assert ours == pytest.approx(value, rel=1e-6)
    assert relative_difference(found, expected) < 1e-6


@pytest.mark.parametrize("name", KNOWN)
def test_logits_at_padding_are_those_of_the_model_itself_too(name):
    model, batch = _wide(name).eval(), _batch(padded=True)
    del batch["labels"]
    expected = model(**batch).logits
    mb.optimize(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)  # of sums of 48 numbers about 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_both_of_transformers_masks_are_understood(name, implementation):
    model, batch = _wide(name, attn_implementation=implementation), _batch(padded=True)
    expected, _ = _mean_gradients(model, batch, _loss(name))
    mb.optimize(model)
    assert _blocks(_loss(name)(model, batch)[0]) == 2
    assert relative_difference(_mean_gradients(model, batch, _loss(name))[0], expected) < 1e-6


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_in_front_falls_back_to_the_models_own_code(name):
    model, batch = _wide(name), _batch(padded=True)
    batch = {key: one.flip(1) for key, one in batch.items()}
    expected, _ = _mean_gradients(model, batch, mb.losses.causal_lm)
    mb.optimize(model)
    assert _blocks(model(**batch, use_cache=False).logits) == 0
    assert relative_difference(_mean_gradients(model, batch, mb.losses.causal_lm)[0], expected) < 1e-6


@pytest.mark.parametrize("name", KNOWN)
def test_an_accumulated_batch_has_the_gradient_of_the_batch_at_once(name):
    model, batch, loss = _wide(name), _batch(padded=True), _loss(name)
    expected, _ = _mean_gradients(model, batch, loss)
    mb.optimize(model)
    for cut in (1, 3, 4):
        for sum_in_product in (True, False):
            mb.Accumulator(model, None, loss, micro_batch=cut, sum_in_product=sum_in_product).gather(batch)
            assert relative_difference(gradients(model), expected) < 1e-6, (cut, sum_in_product)
            model.zero_grad()


@pytest.mark.parametrize("name", KNOWN)
def test_recompute_has_the_same_gradient(name):
    model, batch, loss = _wide(name), _batch(padded=True), _loss(name)
    expected, _ = _mean_gradients(model, batch, loss)
    mb.optimize(model)
    mb.Accumulator(model, None, loss, micro_batch=2, recompute="always").gather(batch)
    assert relative_difference(gradients(model), expected) < 1e-6


def test_recompute_of_named_blocks_works_on_top_and_is_undone_in_any_order():
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    model, batch = _wide("gpt2"), _batch(padded=False)
    expected, _ = _mean_gradients(model, batch, mb.losses.causal_lm)
    handle = mb.optimize(model)
    accumulator = mb.Accumulator(model, None, mb.losses.causal_lm, micro_batch=2, recompute=GPT2Block)
    accumulator.plan = mb.Plan(2, recompute=True)
    accumulator.gather(batch)
    assert relative_difference(gradients(model), expected) < 1e-6
    model.zero_grad()
    handle.undo()
    accumulator.plan = mb.Plan(2, recompute=False)
    accumulator.gather(batch)
    assert relative_difference(gradients(model), expected) < 1e-6
    assert "forward" not in model.transformer.h[0].__dict__ or not _fused_nodes(model(**batch).logits)


@pytest.mark.parametrize("name", KNOWN)
def test_reentrant_checkpointing_of_transformers_works(name):
    model, batch = _wide(name).train(), _batch(padded=True)
    expected, _ = _mean_gradients(model, batch, _loss(name))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    mb.optimize(model)
    assert relative_difference(_mean_gradients(model, batch, _loss(name))[0], expected) < 1e-6


@pytest.mark.parametrize("name", KNOWN)
def test_undo_restores_everything(name):
    model = _wide(name)
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    expected = {key: one.clone() for key, one in model.state_dict().items()}
    handle = mb.optimize(model)
    assert any(module.__dict__ != there for module, there in before)
    handle.undo()
    handle.undo()
    assert all(module.__dict__ == there for module, there in before)
    assert all(torch.equal(one, expected[key]) for key, one in model.state_dict().items())
    assert not _fused_nodes(_loss(name)(model, _batch(padded=False))[0])


@pytest.mark.parametrize("name", KNOWN)
def test_save_pretrained_writes_the_same_files(name, tmp_path):
    model = _wide(name)
    model.save_pretrained(tmp_path / "before")
    names = list(model.state_dict())
    mb.optimize(model)
    model.save_pretrained(tmp_path / "after")
    assert list(model.state_dict()) == names
    files = sorted(one.name for one in (tmp_path / "before").iterdir())
    assert sorted(one.name for one in (tmp_path / "after").iterdir()) == files
    for file in files:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes(), file


@pytest.mark.parametrize("name", CAUSAL)
def test_generate_continues_with_the_same_tokens(name):
    model = _wide(name).eval()
    prompt = torch.randint(5, 101, (2, 7))
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **arguments)
    mb.optimize(model)
    assert torch.equal(model.generate(prompt, **arguments), expected)
    assert torch.equal(model.generate(prompt, use_cache=False, **arguments), expected)


def test_dropout_while_training_falls_back_with_the_same_bits():
    for name, dropout in (("gpt2", {"resid_pdrop": 0.3, "attn_pdrop": 0.2}), ("llama", {"attention_dropout": 0.3}),
                          ("bert", {"attention_probs_dropout_prob": 0.3})):
        model, batch = _wide(name, **dropout).train(), _batch(padded=False)
        del batch["labels"]
        torch.manual_seed(4)
        expected = model(**batch).logits
        mb.optimize(model)
        torch.manual_seed(4)
        found = model(**batch).logits
        assert _blocks(found) == 0, name
        # GPT-2's GELU is ours also here; everything else has the same bits.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert name == "gpt2" or torch.equal(found, expected)
        arguments = {} if name == "bert" else {"use_cache": False}
        assert _blocks(model.eval()(**batch, **arguments).logits) == 2, name


def test_attentions_and_hidden_states_are_returned_as_before():
    for name in KNOWN:
        model, batch = _wide(name, attn_implementation="eager").eval(), _batch(padded=True)
        expected = model(**batch, output_attentions=True, output_hidden_states=True)
        mb.optimize(model)
        found = model(**batch, output_attentions=True, output_hidden_states=True)
        assert len(found.attentions) == 2 and len(found.hidden_states) == 3
        for ours, theirs in zip(found.attentions + found.hidden_states, expected.attentions + expected.hidden_states,
                                strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        # Its hooks stay, and do nothing.
        assert _blocks(model.train()(**batch, output_hidden_states=True).logits) == 2, name


def test_hooks_inside_a_block_see_their_module_run():
    model, batch = _wide("gpt2"), _batch(padded=False)
    mb.optimize(model)
    seen = []
    hook = model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert _blocks(model(**batch).logits) == 1 and seen
    hook.remove()
    assert _blocks(model(**batch).logits) == 2


@pytest.mark.parametrize("name", KNOWN)
def test_other_types_and_autocast_run_the_models_own_code(name):
    model, batch = _wide(name).eval(), _batch(padded=False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits
    double = copy.deepcopy(model).double()
    expected_double = double(**batch).logits
    mb.optimize(model)
    mb.optimize(double)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(double(**batch).logits, expected_double)


@pytest.mark.parametrize("name", KNOWN)
def test_a_copy_is_optimized_and_computes_with_its_own_parameters(name):
    model, batch, loss = _wide(name), _batch(padded=False), _loss(name)
    mb.optimize(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert _fused_nodes(loss(one, batch)[0])
        for parameter in one.parameters():
            torch.nn.init.zeros_(parameter)
        assert _mean_gradients(model, batch, loss)[1] != pytest.approx(_mean_gradients(one, batch, loss)[1], rel=1e-4)
        mb.optimize(one).undo()
        assert not _fused_nodes(loss(one, batch)[0])
    assert _fused_nodes(loss(model, batch)[0])


def test_lora_computes_with_its_adapters():
    from peft import LoraConfig, get_peft_model

    model, batch = _wide("gpt2"), _batch(padded=False)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True))
    for name, one in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(one, std=0.1)
    expected, _ = _mean_gradients(adapted, batch, mb.losses.causal_lm)
    mb.optimize(adapted)
    assert relative_difference(_mean_gradients(adapted, batch, mb.losses.causal_lm)[0], expected) < 1e-6


def test_a_frozen_parameter_gets_no_gradient():
    model, batch = _wide("llama"), _batch(padded=False)
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    model.lm_head.weight.requires_grad_(False)
    expected, _ = _mean_gradients(model, batch, mb.losses.causal_lm)
    mb.optimize(model)
    found, _ = _mean_gradients(model, batch, mb.losses.causal_lm)
    assert relative_difference(found, expected) < 1e-6


def test_the_loss_can_be_differentiated_twice():
    for name in ("gpt2", "llama"):
        results = []
        model, batch = _wide(name, attn_implementation="eager"), _batch(padded=True)
        weight = next(one for key, one in model.named_parameters() if "c_fc.weight" in key or "up_proj.weight" in key)
        for optimized in (False, True):
            if optimized:
                mb.optimize(model)
            total, count = mb.losses.causal_lm(model, batch)
            first = torch.autograd.grad(total / count, weight, create_graph=True)[0]
            results.append(torch.autograd.grad(first.square().sum(), weight)[0])
        difference = (results[1] - results[0]).norm() / results[0].norm()
        assert difference < 1e-5  # a derivative of a derivative, each rounded as the gradients above


def test_a_sliding_window_shorter_than_the_sample_falls_back():
    model, batch = _wide("mistral", sliding_window=6), _batch(padded=False)
    expected, _ = _mean_gradients(model, batch, mb.losses.causal_lm)
    mb.optimize(model)
    assert _blocks(model(**batch).logits) == 0
    assert relative_difference(_mean_gradients(model, batch, mb.losses.causal_lm)[0], expected) < 1e-6


def test_samples_that_are_packed_into_one_do_not_see_each_other():
    model = _wide("llama").train()
    ids = torch.randint(5, 101, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    for use_cache in (None, False):  # only without a cache does `transformers` take them for packed
        arguments = {"input_ids": ids, "position_ids": positions, "use_cache": use_cache}
        expected = model(**arguments).logits
        with mb.optimize(model):
            torch.testing.assert_close(model(**arguments).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_cache_that_is_asked_for_is_filled_while_training_too(name):
    model = _wide(name).train()
    ids = torch.randint(5, 101, (2, 9))
    expected = model(input_ids=ids).logits
    mb.optimize(model)
    assert model(input_ids=ids).cache is None
    first = model(input_ids=ids[:, :6], use_cache=True)
    second = model(input_ids=ids[:, 6:], cache=first.cache)
    torch.testing.assert_close(second.logits, expected[:, 6:], rtol=1e-5, atol=1e-5)


def test_blocks_stay_fused_after_a_transform_of_functions():
    model, batch = _wide("gpt2"), _batch(padded=False)
    mb.optimize(model)
    torch.func.vmap(torch.sin)(torch.ones(2))  # torch.compile does it, too, and leaves its state in the thread
    assert _blocks(model.train()(**batch).logits) == 2
    parameters = dict(model.named_parameters())

    def loss(some):
        return torch.func.functional_call(model, some, kwargs=batch).loss

    found = torch.func.grad(loss)(parameters)
    model(**batch).loss.backward()
    expected = gradients(model)
    assert relative_difference(found, expected) < 1e-6


def test_what_was_replaced_is_reported():
    text = str(mb.optimize(_wide("gpt2")))
    assert "2 x GPT2Block: one fused operation" in text and "2 x NewGELUActivation: fused GELU" in text
    assert "1 x GPT2LMHeadModel" in text


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_blocks_that_dropout_keeps_from_being_fused_are_reported(kind):
    model = _wide(kind)
    assert "dropout" not in str(mb.optimize(model))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    assert "2 of these have dropout: while training they run the model's own code" in str(mb.optimize(model))


def test_optimizing_twice_changes_nothing():
    model = _wide("llama")
    first, second = mb.optimize(model), mb.optimize(model)
    assert first.replaced == second.replaced
    second.undo()
    assert not _fused_nodes(model(**_batch(padded=False)).logits)


def test_a_model_without_known_modules_is_refused():
    with pytest.raises(mb.UsageError, match=r"Sequential has no module that is known; known are .*GPT2Block"):
        mb.optimize(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(mb.UsageError, match="the model is a int"):
        mb.optimize(3)


def test_a_batch_whose_labels_are_all_ignored_has_no_gradient():
    model, batch = _wide("gpt2"), _batch(padded=False)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    mb.optimize(model)
    total, weight = mb.losses.causal_lm(model, batch)
    total.backward()
    assert float(total.detach()) == 0.0 and weight == 0
    assert all(one.grad is None or not one.grad.any() for one in model.parameters())
