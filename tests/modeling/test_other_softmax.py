"""Attentions of another softmax than noun maps are of, each refused by the name of what it has."""

import pytest
import torch
import transformers
from torch import nn

from swim_fast import families
from swim_fast.families import Family, UnsupportedModelError
from swim_fast.modeling import attach_noun_attention
from swim_kernels import NounQueries

TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50, "pad_token_id": 0}
TEXT |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


@pytest.fixture
def build(monkeypatch):
    """Builds a tiny stock decoder as a model of a family of its own, which has no vision."""

    def build(name, config="Config", **more):
        config = getattr(transformers, f"{name}{config}")(**TEXT, **more)
        family = Family(
            name=name,
            model_types=(config.model_type,),
            processors=(),
            layout=families.VisualLayout,
            language_model="model",
            visual="model.embed_tokens",
            mergers=(),
            minimal_pass=None,
            vision=None,
        )
        monkeypatch.setattr(families, "FAMILIES", [family])
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager").eval()

    return build


def ask(model):
    one = torch.tensor([3])
    queries = NounQueries(one * 0, one, one * 0, one + 1, one * 0, torch.tensor([[0, 1]]))
    return model(torch.arange(6)[None], noun_queries=queries).attentions


def test_a_plain_decoder_is_taken(build):
    model = build("Gemma2", attn_logit_softcapping=None)
    wanted = model(torch.arange(6)[None], output_attentions=True).attentions[1][0, :, 3, :2].mean(0)
    (maps,) = ask(attach_noun_attention(model))
    torch.testing.assert_close(maps[0], wanted)


def test_a_cap_on_the_scores(build):
    with pytest.raises(UnsupportedModelError, match=r"Gemma2Attention has a cap on the scores \(softcap\)"):
        attach_noun_attention(build("Gemma2", attn_logit_softcapping=50.0))


def test_sinks(build):
    model = build("GptOss", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(UnsupportedModelError, match=r"GptOssAttention has sinks \(sinks\)"):
        attach_noun_attention(model)


def test_attention_that_is_not_causal(build):
    model = build("Gemma3", "TextConfig", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModelError, match=r"Gemma3Attention has no causal mask \(is_causal\)"):
        attach_noun_attention(model)


@pytest.mark.parametrize("name, what", [("position_bias", "a bias by position"), ("s_aux", "sinks")])
def test_what_only_the_forward_hands_over(build, name, what, monkeypatch):
    model = attach_noun_attention(build("Gemma2", attn_logit_softcapping=None))
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: forward(*args, **{**kwargs, name: torch.ones(1)}))
    with pytest.raises(UnsupportedModelError, match=rf"has {what} \({name}\)"):
        ask(model)


def test_the_layer_is_named_by_its_class(build):
    class CappedAttention(nn.Module):
        attn_logit_softcapping = 30.0

    model = build("Gemma2", attn_logit_softcapping=None)
    model.model.layers[1].self_attn = CappedAttention()
    with pytest.raises(UnsupportedModelError, match="CappedAttention has a cap on the scores"):
        attach_noun_attention(model)
