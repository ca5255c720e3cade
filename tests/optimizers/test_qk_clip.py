"""QK-Clip: each head's logits are multiplied by gamma, whichever way the weights are kept."""

import pytest
import torch

import functorch_optim as fo

HEADS, SIZE, WIDTH = 4, 3, 5
LOGITS = torch.tensor([50.0, 400.0, 1000.0, 100.0], dtype=torch.float64)
GAMMA = torch.tensor([1.0, 0.25, 0.1, 1.0], dtype=torch.float64)


def projected(x, p, name, heads):
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    return (x @ weight.mT + bias).reshape(-1, heads, SIZE).transpose(0, 1)


def logits(x, p, key_heads=HEADS):
    q, k = projected(x, p, "q_proj", HEADS), projected(x, p, "k_proj", key_heads)
    return q @ k.repeat_interleave(HEADS // key_heads, 0).mT


def attention(key_heads=HEADS, dtype=torch.float64):
    torch.manual_seed(0)
    rows = {"q_proj": HEADS * SIZE, "k_proj": key_heads * SIZE, "v_proj": HEADS * SIZE}
    weights = {f"{name}.weight": torch.randn(count, WIDTH, dtype=dtype) for name, count in rows.items()}
    return weights | {f"{name}.bias": torch.randn(count, dtype=dtype) for name, count in rows.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.3])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_the_logits_of_each_head_are_multiplied_by_gamma(key_heads, alpha):
    params, x = attention(key_heads), torch.randn(7, WIDTH, dtype=torch.float64)
    clipped = fo.qk_clip(params, LOGITS, 100.0, alpha=alpha)
    before, after = logits(x, params, key_heads), logits(x, clipped, key_heads)
    torch.testing.assert_close(after, GAMMA[:, None, None] * before, rtol=1e-12, atol=1e-12)
    assert (after - before).abs().max() > 0.1
    assert clipped["v_proj.weight"] is params["v_proj.weight"]


def test_queries_and_keys_have_equal_parts():
    params = attention()
    clipped = fo.qk_clip(params, LOGITS)
    for name in ("q_proj.weight", "k_proj.weight", "q_proj.bias"):
        expected = params[name] * GAMMA.sqrt().repeat_interleave(SIZE).reshape(-1, *[1] * (params[name].ndim - 1))
        torch.testing.assert_close(clipped[name], expected, rtol=1e-12, atol=0)


def test_logits_may_be_a_list():
    params, several = attention(), {"one": attention(), "other": attention()}
    expected = fo.qk_clip(params, LOGITS)["q_proj.weight"]
    torch.testing.assert_close(fo.qk_clip(params, LOGITS.tolist())["q_proj.weight"], expected)
    torch.testing.assert_close(fo.qk_clip(several, {"other": LOGITS.tolist()})["other"]["q_proj.weight"], expected)
    deep = fo.qk_clip({"layers": several}, {"layers": {"other": LOGITS.tolist()}})["layers"]
    torch.testing.assert_close(deep["other"]["q_proj.weight"], expected)


@pytest.mark.parametrize("tau", [1000.0, torch.tensor(1000.0)])
def test_what_is_small_or_not_finite_changes_nothing(tau):
    params = attention()
    for value in (999.0, float("nan"), float("inf"), -5000.0, 0.0):
        clipped = fo.qk_clip(params, torch.full((HEADS,), value), tau)
        assert all(torch.equal(clipped[name], p) for name, p in params.items())


def test_attentions_by_path_and_parameters_in_half_precision():
    params = {"layers": [{"attn": attention(dtype=torch.bfloat16)} for _ in range(2)], "head": torch.ones(2)}
    clipped = fo.qk_clip(params, {"layers.1.attn": LOGITS})
    assert torch.equal(clipped["layers"][0]["attn"]["q_proj.weight"], params["layers"][0]["attn"]["q_proj.weight"])
    changed = clipped["layers"][1]["attn"]["q_proj.weight"]
    assert changed.dtype == torch.bfloat16
    assert not torch.equal(changed, params["layers"][1]["attn"]["q_proj.weight"])
    nested = fo.qk_clip(params, {"layers": {"1": {"attn": LOGITS}}})
    assert torch.equal(nested["layers"][1]["attn"]["k_proj.weight"], clipped["layers"][1]["attn"]["k_proj.weight"])


def test_a_fused_projection_as_torchs_attention_has_it():
    attn = torch.nn.MultiheadAttention(12, HEADS, dtype=torch.float64)
    params = {"attn": fo.params_of(attn)}
    clipped = fo.qk_clip(params, {"attn": LOGITS})["attn"]
    factor = torch.cat([GAMMA.sqrt().repeat_interleave(3)] * 2 + [torch.ones(12, dtype=torch.float64)])
    torch.testing.assert_close(clipped["in_proj_weight"], factor[:, None] * params["attn"]["in_proj_weight"])
    torch.testing.assert_close(clipped["in_proj_bias"], factor * params["attn"]["in_proj_bias"])
    assert clipped["out_proj.weight"] is params["attn"]["out_proj.weight"]


def test_rotary_queries_have_all_of_gamma():
    params = {"q": torch.ones(4, 2), "k": torch.ones(4, 2), "q_rope": torch.ones(4, 2), "k_rope": torch.ones(1, 2)}
    clipped = fo.qk_clip(params, LOGITS.float(), rotary=("q_rope",))
    torch.testing.assert_close(clipped["q_rope"][:, 0], GAMMA.float())
    torch.testing.assert_close(clipped["k"][:, 0], GAMMA.sqrt().float())
    assert clipped["k_rope"] is params["k_rope"]


def test_muonclip_of_another_program_scales_the_same_way():
    package = pytest.importorskip("pytorch_optimizer")
    params = {name: torch.nn.Parameter(p.float()) for name, p in attention().items() if "weight" in name}
    roles = {"q_proj.weight": "query", "k_proj.weight": "key"}
    groups = [
        {"params": [params[name]], "use_muon": True, "lr": 0.0, "qk_clip": role, "attention_name": "a"}
        for name, role in roles.items()
    ]
    opt = package.MuonClip(groups)
    before = {name: p.detach().clone() for name, p in params.items()}
    for p in params.values():
        p.grad = torch.zeros_like(p)
    opt.step(attention_max_logits={"a": LOGITS})
    clipped = fo.qk_clip(before, LOGITS)
    for name in roles:
        torch.testing.assert_close(clipped[name].float(), params[name].detach(), rtol=1e-6, atol=0)


def test_it_is_differentiable_and_runs_under_vmap():
    params = attention()
    tau = torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
    logits = LOGITS.clone().requires_grad_()

    def of(tau, logits, weight):
        return fo.qk_clip({**params, "q_proj.weight": weight}, logits, tau)["q_proj.weight"].sin().sum()

    weight = params["q_proj.weight"].clone().requires_grad_()
    shifted = logits.detach().clone() + torch.tensor([0.0, 0.0, 0.0, -1.0])  # away from the kink at tau
    assert torch.autograd.gradcheck(of, (tau, shifted.requires_grad_(), weight))
    each = torch.vmap(lambda s: fo.qk_clip(params, s)["k_proj.weight"])(torch.stack([LOGITS, LOGITS / 2]))
    torch.testing.assert_close(each[1], fo.qk_clip(params, LOGITS / 2)["k_proj.weight"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fo.qk_clip(attention(), LOGITS, -1.0), "Invalid tau: -1.0; it needs value > 0"),
        (lambda: fo.qk_clip(attention(), LOGITS, alpha=2.0), "Invalid alpha: 2.0"),
        (lambda: fo.qk_clip({"w": torch.ones(2, 2)}, LOGITS), "Below '' there are 0 query, 0 key .* there are w"),
        (lambda: fo.qk_clip({"a": attention(), "b": attention()}, LOGITS), "Below '' there are 2 query, 2 key"),
        (
            lambda: fo.qk_clip(attention(), {"attn": LOGITS}),
            "Below 'attn' there are 0 query, .*there are no parameters",
        ),
        (lambda: fo.qk_clip(attention(), torch.ones(5)), "max_logits has 5 heads, which do not fit the 12 rows"),
        (lambda: fo.qk_clip({"qkv": torch.ones(7, 2)}, LOGITS), "'qkv' has 7 rows"),
        (lambda: fo.qk_clip({"qkv": torch.ones(9, 2)}, LOGITS), "4 heads, which do not divide the 3 rows of 'qkv'"),
    ],
)
def test_what_does_not_fit_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
