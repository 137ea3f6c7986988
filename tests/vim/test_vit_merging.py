"""Token merging on ViT and DeiT models of timm and transformers, against a dense twin that goes sample by sample."""

import copy
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from helpers import assert_close, existing_gradients, randomized, require_package
from hf_effml.vim.evaluation.visualize import visualize_merge
from hf_effml.vim.modeling_rmeeto import apply_token_merging, remove_token_merging, token_merging
from hf_effml.vim.vit_merging import vit_merge_info


_SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}


def _transformers_model(kind, implementation="sdpa"):
    config_class = ViTConfig if kind.__name__.startswith("ViT") else DeiTConfig
    config = config_class(image_size=32, patch_size=8, num_labels=5, **_SIZES, attn_implementation=implementation)
    return randomized(kind(config))


def _timm_model(distilled=False, **arguments):
    require_package("timm")
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    kind = VisionTransformerDistilled if distilled else VisionTransformer
    sizes = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    return randomized(kind(**sizes | arguments))


_MODELS = {
    "vit": lambda: _transformers_model(ViTForImageClassification),
    "vit_eager": lambda: _transformers_model(ViTForImageClassification, "eager"),
    "vit_without_head": lambda: _transformers_model(ViTModel),
    "deit": lambda: _transformers_model(DeiTForImageClassification),
    "deit_with_teacher": lambda: _transformers_model(DeiTForImageClassificationWithTeacher),
    "timm": _timm_model,
    "timm_distilled": lambda: _timm_model(distilled=True),
    "timm_average": lambda: _timm_model(global_pool="avg", class_token=False),
    "timm_average_beside_class": lambda: _timm_model(global_pool="avg"),
    "timm_registers": lambda: _timm_model(reg_tokens=3, init_values=0.5, qk_norm=True),
    "timm_attention_pool": lambda: _timm_model(global_pool="map", class_token=False),
    "timm_post_norm": lambda: _timm_model(block_fn=_post_norm_block(), init_values=0.5),
}
_PREFIX = {"deit": 2, "deit_with_teacher": 2, "timm_distilled": 2, "timm_registers": 4}
_WITHOUT_PREFIX = ("timm_average", "timm_attention_pool")


def _post_norm_block():
    return require_package("timm.models.vision_transformer").ResPostBlock


@pytest.fixture(params=_MODELS)
def named_model(request):
    return request.param, _MODELS[request.param]()


@pytest.fixture(params=["vit", "deit", "timm", "timm_distilled"])
def model(request):
    return _MODELS[request.param]()


def _images(batch=3, size=32, seed=0):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _prefix(name):
    return 0 if name in _WITHOUT_PREFIX else _PREFIX.get(name, 1)


def _output(model, images):
    """The logits, or all tokens of a model without a head."""
    output = model(images)
    return output if isinstance(output, torch.Tensor) else output[0]


# The dense twin: one sample at a time, an averaging matrix per merge, the log of the sizes added to the scores.


def _twin(model, name, images, removed):
    """Like `_output` with `removed[i]` tokens merged before block i; also the groups of patches at the end."""
    is_timm, prefix = hasattr(model, "patch_embed"), _prefix(name)
    encoder = model if is_timm else getattr(model, model.base_model_prefix, model)
    if is_timm:
        tokens = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))
    else:
        tokens = encoder.embeddings(images)
    results, memberships = [], []
    for x in tokens:
        membership, keys = torch.eye(x.shape[0], dtype=x.dtype), None  # (tokens now, tokens before block 0)
        for index, block in enumerate(encoder.blocks if is_timm else encoder.layers):
            if removed[index]:
                average = _averaging_matrix(keys.detach(), membership.sum(1), removed[index], prefix)
                x, membership = average @ x, (average > 0).to(x.dtype) @ membership
            forward = _timm_block if is_timm else _transformers_block
            x, keys = forward(block, x, membership.sum(1).log())
        x = (encoder.norm if is_timm else encoder.layernorm)(x)
        results.append(membership.T @ x)
        memberships.append(membership)
    tokens = torch.stack(results)
    if is_timm:
        return model.forward_head(tokens), memberships
    if isinstance(model, ViTModel):
        return tokens, memberships
    if isinstance(model, DeiTForImageClassificationWithTeacher):
        heads = model.cls_classifier(tokens[:, 0]), model.distillation_classifier(tokens[:, 1])
        return (heads[0] + heads[1]) / 2, memberships
    return model.classifier(tokens[:, 0]), memberships


def _averaging_matrix(keys, sizes, r, prefix):
    """`(tokens - r, tokens)`: ToMe's matching on `keys` `(tokens, features)`; survivors stay in order."""
    tokens = keys.shape[0]
    free = range(prefix, tokens)
    matches = []
    for source in (token for token in free if token % 2 == 0):
        similar = [(float(torch.cosine_similarity(keys[source], keys[to], dim=0)), to) for to in free if to % 2]
        matches.append((*max(similar), source))
    leaving = {source: to for _, to, source in sorted(matches, reverse=True)[:r]}
    kept = [token for token in range(tokens) if token not in leaving]
    matrix = torch.zeros(len(kept), tokens, dtype=sizes.dtype)
    for row, token in enumerate(kept):
        group = [token, *(source for source, to in leaving.items() if to == token)]
        for member in group:
            matrix[row, member] = sizes[member] / sizes[group].sum()
    return matrix


def _attend(queries, keys, values, bias):
    """Dense attention over `(heads, tokens, features)`, and the mean key."""
    scores = queries @ keys.mT / math.sqrt(queries.shape[2]) + bias
    return (scores.softmax(dim=2) @ values).transpose(0, 1).flatten(1), keys.mean(0)


def _timm_block(block, x, bias):
    def attention(x):
        both = block.attn.qkv(x).unflatten(1, (3, block.attn.num_heads, -1)).permute(1, 2, 0, 3)
        mixed, key = _attend(block.attn.q_norm(both[0]), block.attn.k_norm(both[1]), both[2], bias)
        return block.attn.proj(mixed), key

    if isinstance(block, _post_norm_block()):
        mixed, key = attention(x)
        x = x + block.norm1(mixed)
        return x + block.norm2(block.mlp(x)), key
    mixed, key = attention(block.norm1(x))
    x = x + block.ls1(mixed)
    return x + block.ls2(block.mlp(block.norm2(x))), key


def _transformers_block(block, x, bias):
    attention, normed = block.attention, block.layernorm_before(x)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    heads = [projection(normed).unflatten(1, (2, -1)).transpose(0, 1) for projection in projections]
    mixed, key = _attend(*heads, bias)
    x = x + attention.o_proj(mixed)
    return x + block.mlp(block.layernorm_after(x)), key


@pytest.mark.parametrize("r", [3, [0, 2, 0, 5]], ids=str)
def test_equals_the_dense_twin(named_model, r):
    name, model = named_model
    images = _images()
    apply_token_merging(model, r=r)
    removed = [0, 3, 3, 3] if r == 3 else r
    actual, info = _output(model, images), vit_merge_info(model)
    remove_token_merging(model)
    expected, memberships = _twin(model, name, images, removed)
    assert_close(actual, expected, 3e-6, name)
    for slot, size, membership in zip(info.slot, info.sizes, memberships, strict=True):
        assert slot.tolist() == membership.argmax(dim=0).tolist()
        assert size.squeeze(1).tolist() == membership.sum(dim=1).tolist()
    tokens = 16 + _prefix(name)
    assert info.tokens_per_layer == [tokens - sum(removed[: block + 1]) for block in range(4)]
    assert info.class_index.tolist() == [list(range(_prefix(name)))] * 3


def test_gradients_equal_those_of_the_dense_twin(named_model):
    name, model = named_model
    model, images = model.double(), _images(batch=2).double()
    twin = copy.deepcopy(model)
    apply_token_merging(model, r=3)
    for output in (_output(model, images), _twin(twin, name, images, [0, 3, 3, 3])[0]):
        output.sin().sum().backward()
    assert_close(existing_gradients(model), existing_gradients(twin), 1e-6, name)


def test_off_is_exact(named_model):
    _, model = named_model
    images = _images()
    before, traces = _output(model, images), _traces(model)
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    for r in (0, 0.0, [], [0, 0, 0, 0]):
        apply_token_merging(model, r=r)
        assert torch.equal(_output(model, images), before)
    apply_token_merging(model, r=4)
    assert not torch.equal(_output(model, images), before)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == kinds
    apply_token_merging(model, r=2)
    remove_token_merging(model)
    remove_token_merging(model)
    assert torch.equal(_output(model, images), before)
    assert _traces(model) == traces


def _traces(model):
    """Every attribute and hook of every module; transformers has hooks of its own there."""
    return {
        name: {key: list(value) if key.startswith("_forward") else None for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


def test_samples_do_not_depend_on_their_batch(model):
    images = _images()
    apply_token_merging(model, r=4)
    together = _output(model, images)
    alone = torch.cat([_output(model, image[None]) for image in images])
    assert_close(alone, together, 1e-6)
    assert_close(_output(model, images.flip(0)).flip(0), together, 1e-6)


def test_context_manager_goes_back(model):
    images = _images()
    plain = _output(model, images)
    with token_merging(model, r=5) as inside:
        strong = _output(inside, images)
    assert torch.equal(_output(model, images), plain)
    apply_token_merging(model, r=2)
    weak = _output(model, images)
    with pytest.raises(KeyError), token_merging(model, r=5):
        assert torch.equal(_output(model, images), strong)
        raise KeyError
    assert torch.equal(_output(model, images), weak)
    with pytest.raises(StrictDataclassError, match="merge_r"):
        apply_token_merging(model, r=-1)
    assert torch.equal(_output(model, images), weak)


def test_a_merged_model_saves_the_plain_checkpoint(tmp_path):
    model = _MODELS["vit"]()
    model.save_pretrained(tmp_path / "plain")
    apply_token_merging(model, r=4)
    model.save_pretrained(tmp_path / "merged")
    files = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == files


def test_a_copy_is_independent(model):
    images = _images()
    plain = _output(model, images)
    apply_token_merging(model, r=4)
    merged = _output(model, images)
    copied = copy.deepcopy(model)
    assert torch.equal(_output(copied, images), merged)
    remove_token_merging(copied)
    assert torch.equal(_output(copied, images), plain)
    assert torch.equal(_output(model, images), merged)
    remove_token_merging(model)
    assert torch.equal(_output(model, images), plain)


def test_eager_equals_sdpa():
    model = _MODELS["deit"]()
    apply_token_merging(model, r=4)
    fused = _output(model, _images())
    model.set_attn_implementation("eager")
    assert_close(_output(model, _images()), fused, 1e-6)


def test_bfloat16_and_autocast(model):
    images = _images()
    apply_token_merging(model, r=3)
    expected = _output(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(_output(model, images).float(), expected, 0.1)
    low = _output(model.bfloat16(), images.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), expected, 0.1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_equals_none(model, reentrant):
    def gradients(model):
        images = _images().requires_grad_()
        _output(model.train(), images).sin().sum().backward()
        return existing_gradients(model)

    apply_token_merging(model, r=3)
    expected = gradients(copy.deepcopy(model))
    _checkpoint(model, reentrant)
    assert_close(gradients(model), expected, 1e-6)


def _checkpoint(model, reentrant):
    if hasattr(model, "set_grad_checkpointing"):
        require_package("timm").layers.set_reentrant_ckpt(reentrant)
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def test_checkpointing_never_mixes_forward_passes(model):
    """Where hooks run inside the checkpoint, the plans of an earlier pass are gone: an error, no wrong gradient."""
    apply_token_merging(model, r=3)
    model.train()
    _output(model, _images(seed=1)).sin().sum().backward()
    expected = existing_gradients(model)
    model.zero_grad()
    _checkpoint(model, reentrant=False)
    output = _output(model, _images(seed=1)).sin().sum()
    _output(model, _images(seed=2))
    try:
        output.backward()
    except RuntimeError as error:
        assert "call `backward` before the next" in str(error)
    else:
        assert_close(existing_gradients(model), expected, 1e-6)


@pytest.mark.parametrize(
    ("amount", "patches"),
    [
        ({"target_ratio": 0.3}, [16, 13, 10, 7]),
        ({"r": 0.25, "interval": 2}, [16, 16, 12, 12]),
        ({"r": [0, 0, 3]}, [16, 16, 13, 13]),
        ({"r": 100}, [16, 8, 4, 2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["vit", "deit", "timm_distilled", "timm_registers", "timm_average"])
def test_amounts(name, amount, patches):
    model = _MODELS[name]()
    apply_token_merging(model, **amount)
    _output(model, _images())
    assert vit_merge_info(model).tokens_per_layer == [count + _prefix(name) for count in patches]


def test_other_image_sizes():
    model = _MODELS["vit"]()
    apply_token_merging(model, r=4)
    model(_images(size=48), interpolate_pos_encoding=True)
    assert vit_merge_info(model).tokens_per_layer == [37, 33, 29, 25]
    model = _timm_model(dynamic_img_size=True)
    apply_token_merging(model, r=4)
    model(_images(size=48))
    assert vit_merge_info(model).tokens_per_layer == [37, 33, 29, 25]


def test_outputs_keep_their_shapes():
    images = _images()
    config = ViTConfig(image_size=32, patch_size=8, encoder_stride=8, **_SIZES)
    model = randomized(ViTForMaskedImageModeling(config))
    apply_token_merging(model, r=4)
    output = model(images, bool_masked_pos=torch.zeros(3, 16, dtype=torch.bool), output_hidden_states=True)
    assert output.reconstruction.shape == images.shape
    assert [states.shape[1] for states in output.hidden_states] == [17, 17, 13, 9, 5]


def test_timm_features_keep_their_shape():
    model = _timm_model()
    apply_token_merging(model, r=4)
    assert model.forward_features(_images()).shape == (3, 17, 32)


def test_a_picture_can_be_drawn(model):
    apply_token_merging(model, r=4)
    with pytest.raises(RuntimeError, match="run the model"):
        vit_merge_info(model)
    _output(model, _images())
    picture = visualize_merge(Image.new("RGB", (32, 32), "orange"), vit_merge_info(model))
    assert picture.width > picture.height


def test_wrapped_models(model):
    images = _images()
    apply_token_merging(model, r=4)
    expected = _output(model, images)
    remove_token_merging(model)
    wrapped = nn.Sequential(model)
    with token_merging(wrapped, r=4):
        assert torch.equal(_output(wrapped, images), expected)


def test_lora():
    peft = require_package("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(_MODELS["vit"](), config).eval()
    apply_token_merging(model, r=4)
    expected = model(_images()).logits
    model = model.merge_and_unload()
    with pytest.raises(RuntimeError, match="call `apply_token_merging` again"):
        model(_images())
    apply_token_merging(model, r=4)
    assert_close(model(_images()).logits, expected, 1e-5)


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_compiled_equals_eager(name):
    model = _MODELS[name]()
    apply_token_merging(model, r=3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for images in (_images(seed=0), _images(seed=1)):
        assert_close(_output(compiled, images), _output(model, images), 1e-6)


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_exported_equals_eager(name):
    model = _MODELS[name]()
    apply_token_merging(model, r=3)
    program = torch.export.export(model, (_images(seed=0),)).module()
    assert_close(_output(program, _images(seed=1)), _output(model, _images(seed=1)), 1e-6)


def test_unsupported_models_are_refused_by_name():
    vit = _MODELS["vit"]()
    with pytest.raises(TypeError, match="`Linear` contains 0"):
        apply_token_merging(nn.Linear(2, 2), r=1)
    with pytest.raises(TypeError, match="`Linear` contains 0"):
        remove_token_merging(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="`ModuleList` contains 2"):
        apply_token_merging(nn.ModuleList([vit, _MODELS["deit"]()]), r=1)
    with pytest.raises(TypeError, match="class_position"):
        apply_token_merging(vit, r=1, class_position="exact")
    with pytest.raises(ValueError, match="out of reach"):
        apply_token_merging(vit, target_ratio=0.99)
    apply_token_merging(vit, r=1)
    mask = torch.ones(3, 17)
    for arguments in ({"attention_mask": mask}, {"attention_mask": mask[:, None, None].bool()}):
        with pytest.raises(ValueError, match="attention mask"):
            vit(_images(), **arguments)
    with pytest.raises(ValueError, match="attention mask"):
        vit.vit(_images(), None, None, mask)
    vit.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TypeError, match='"sdpa" or "eager"; got \'flash_attention_2\''):
        apply_token_merging(vit, r=1)


def test_unsupported_timm_models_are_refused_by_name():
    timm = require_package("timm.models.vision_transformer")
    with pytest.raises(TypeError, match="`ParallelThingsBlock` with `NoneType`"):
        apply_token_merging(_timm_model(block_fn=timm.ParallelThingsBlock), r=1)
    with pytest.raises(TypeError, match="`Block` with `DiffAttention`"):
        apply_token_merging(_timm_model(attn_layer="diff"), r=1)
    model = _timm_model()
    apply_token_merging(model, r=1)
    for mask in ({"attn_mask": torch.zeros(17, 17)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="attention mask"):
            model(_images(), **mask)


# What timm collects on its way


@pytest.mark.parametrize("name", ["timm", "timm_distilled", "timm_average", "timm_registers"])
@pytest.mark.parametrize("norm", [False, True])
def test_intermediate_maps_have_every_patch(name, norm):
    model, given = _MODELS[name](), _images()
    dense = model.forward_intermediates(given, norm=norm)
    apply_token_merging(model, r=2)
    wanted = model.forward_features(given)
    final, maps = model.forward_intermediates(given, norm=norm)
    assert_close(final, wanted)
    assert [each.shape for each in maps] == [each.shape for each in dense[1]] == [(3, 32, 4, 4)] * 4
    assert_close(maps[0], dense[1][0])
    prefix = model.num_prefix_tokens
    last = maps[-1].flatten(2).mT
    assert_close(last if norm else model.norm.forward(last), wanted[:, prefix:], 1e-5)
    # Merged patches are equal: 2 fewer rows with every block.
    assert [len(each[0].flatten(1).T.unique(dim=0)) for each in maps] == [16, 14, 12, 10]
    assert_close(model.get_intermediate_layers(given, n=[1], norm=norm, reshape=True)[0], maps[1])
    maps[1].sum().backward()
    assert any(gradient.any() for gradient in existing_gradients(model).values())
    remove_token_merging(model)
    assert "forward_intermediates" not in vars(model)
    assert_close(model.forward_intermediates(given, norm=norm)[1], dense[1])


def test_features_only():
    timm = require_package("timm")
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, img_size=64, out_indices=(3, 7, 11)).eval()
    given = _images(1, 64)
    shapes = [tuple(each.shape) for each in model(given)]
    with token_merging(model, r=1):
        assert [tuple(each.shape) for each in model(given)] == shapes == [(1, 192, 4, 4)] * 3
