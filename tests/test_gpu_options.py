"""The router's options on a GPU against the exact oracle: alone, in pairs and all together.

Inputs are small integers, whose logits are exact in any order of the sums: every bit must be equal.
Rows that are padding hold NaN and infinity. Every call writes into outputs that are larger than it
may touch; see `Routed.run`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed")

from gpu_calls import (  # noqa: E402
    BF16,
    CANARY,
    captured,
    gaussian,
    integers,
    laid_out,
    logits_of,
    most_in_one_launch,
    outputs,
)

from dsv4_router_runtime import Router, dense_router_dispatch  # noqa: E402
from dsv4_router_runtime.exact import exact_logits, exact_selection  # noqa: E402
from dsv4_router_runtime.reference import padded_rows  # noqa: E402

pytestmark = pytest.mark.gpu

K, E, TOP_K, SCALE, VOCAB, REPLICAS = 1024, 160, 6, 2.5, 50, 3
# Of 160 experts prefill takes 65 to 960.
TOKENS = [1, 8, 9, 33, 56, 57, 64, 65, 130, 300, 400, 700, 1000]
LAYOUTS = ["kmajor", "emajor"]
INT32 = torch.int32
# Physical ids start here: apart from every logical id and every shared one.
PHYSICAL = 1000


@pytest.fixture
def random(seed):
    """A generator on the GPU, seeded by the test's own id."""
    return torch.Generator(device="cuda").manual_seed(seed)


@dataclass(kw_only=True)
class Routed:
    """A layer, a batch and their options: what a call of the router is, and what it must give."""

    x: Any
    W: Any
    bias: Any
    top_k: int
    layer: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    # Optional outputs by name, and those of the last run.
    asked: tuple = ()
    got: dict = field(default_factory=dict)
    weights_dtype: Any = torch.float32
    ids_dtype: Any = INT32

    @property
    def columns(self) -> int:
        return self.top_k + self.layer.get("num_shared_slots", 0)

    def router(self, **more) -> Router:
        given = {"top_k": self.top_k, "routed_scaling_factor": SCALE} | self.layer | more
        return Router(self.W, self.bias, **given)

    def outputs(self, rows: int = 0, columns: int = 0):
        weights, ids = outputs(len(self.x) + rows, self.columns + columns)
        return weights.to(self.weights_dtype), ids.to(self.ids_dtype)

    def optional_outputs(self, rows: int = 0, columns: int = 0):
        """The outputs of `asked`, by name."""
        of_ids = outputs(len(self.x) + rows, self.top_k + columns)[1]
        of_logits = outputs(len(self.x) + rows, self.W.shape[1] + columns)[0]
        made = {"out_logical_ids": of_ids, "out_logits": of_logits}
        return {name: made[name] for name in self.asked}

    def run(self, router=None, rows: int = 2, columns: int = 2):
        """Route into outputs with `rows` and `columns` to spare, whose canaries must survive."""
        num_tokens = len(self.x)
        router = self.router() if router is None else router
        # A row and a column are left free before the outputs too.
        made = self.outputs(rows + 1, columns + 1), self.optional_outputs(rows + 1, columns + 1)
        outs = {"weights": made[0][0], "ids": made[0][1], **made[1]}
        weights, ids, *more = (out[1:, 1:] for out in outs.values())
        router(self.x, weights, ids, **self.call, **dict(zip(self.asked, more, strict=True)))
        self.got = {}
        for name, out in outs.items():
            width = out.shape[1] - columns - 1
            assert (out[0] == CANARY).all(), f"{name}: wrote before the first row"
            assert (out[num_tokens + 1 :] == CANARY).all(), f"{name}: wrote behind the last row"
            assert (out[:, 0] == CANARY).all(), f"{name}: wrote before a row's first column"
            assert (out[:, width + 1 :] == CANARY).all(), f"{name}: wrote behind a row's last one"
            self.got[name] = out[1 : num_tokens + 1, 1 : width + 1]
        return self.got.pop("weights"), self.got.pop("ids")

    def expected(self):
        """Weights in FP32, and ids."""
        return self.selected(logits_of(self.x, self.W).float())

    def selected(self, logits):
        return exact_selection(
            logits,
            self.bias,
            SCALE,
            self.top_k,
            **self.layer,
            **self.call,
            ids_dtype=self.ids_dtype,
        )

    def padded(self):
        """Which rows get -1 and 0, bool [N]."""
        masks = (self.call.get("padding_mask"), self.call.get("num_tokens"))
        padded = padded_rows(len(self.x), self.x.device, *masks)
        if "tid2eid" in self.layer:
            tokens = self.call["input_ids"]
            outside = (tokens < 0) | (tokens >= len(self.layer["tid2eid"]))
            padded |= outside & ~self.images() & ~self.forced()
        if "forced_ids" in self.call:
            ids, experts = self.call["forced_ids"], self.W.shape[1]
            order = ids.sort(1)[0]
            wrong = (order[:, 0] < 0) | (order[:, -1] >= experts) | (order.diff(dim=1) == 0).any(1)
            padded |= wrong & self.forced()
        return padded

    def images(self):
        """Which rows are of images, by the mask or by their token ids, bool [N]."""
        images = torch.zeros(len(self.x), dtype=torch.bool, device="cuda")
        if "image_mask" in self.call:
            images |= self.call["image_mask"]
        if count := self.layer.get("num_image_ids"):
            first = self.layer["first_image_id"]
            wanted = torch.arange(first, first + count, device="cuda")
            images |= torch.isin(self.call["input_ids"].long(), wanted)
        return images

    def forced(self):
        """Which rows have the caller's ids, bool [N]."""
        rows = torch.full((len(self.x),), "forced_ids" in self.call, device="cuda")
        return rows & self.call["forced_mask"] if "forced_mask" in self.call else rows

    def spoil(self):
        """Fill what padded rows hold with NaN, inf and -inf."""
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=BF16, device=self.x.device)
        rows = self.padded().nonzero().flatten()
        self.x[rows] = odd[rows % 3][:, None]

    def agrees(self, weights, ids, about: str) -> None:
        """Every bit of ids and weights; the message names the case and the first wrong row."""
        expected_weights, expected_ids = self.expected()
        expected_weights = expected_weights.to(self.weights_dtype)
        wrong = ((ids != expected_ids) | (weights != expected_weights)).any(1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            pytest.fail(
                f"{about}: {int(wrong.sum())} of {len(wrong)} rows wrong; row {row} has "
                f"ids {ids[row].tolist()} weights {weights[row].tolist()}, expected "
                f"ids {expected_ids[row].tolist()} weights {expected_weights[row].tolist()}"
            )
        if "out_logical_ids" in self.got:
            maps = {"to_physical": None, "logical_count": None}
            unmapped = replace(self, layer=self.layer | maps, ids_dtype=INT32).expected()[1]
            logical_ids = unmapped[:, : self.top_k]
            assert torch.equal(self.got["out_logical_ids"], logical_ids), f"{about}: logical ids"
        if "out_logits" in self.got:
            torch.testing.assert_close(
                self.got["out_logits"].double(), logits_of(self.x, self.W),
                rtol=0, atol=0, equal_nan=True, msg=f"{about}: logits",
            )  # fmt: skip


# ------------------------------------------------------------------ the options


def on(random, *shape, share=0.5):
    return torch.rand(*shape, generator=random, device="cuda") < share


def between(random, low: int, high: int, *shape, dtype=INT32):
    return torch.randint(low, high, shape, generator=random, device="cuda", dtype=dtype)


def with_text(routed: Routed, random) -> None:
    """A second bias that no row of this call uses."""
    experts = routed.W.shape[1]
    routed.layer["bias_vl"] = between(random, 0, 3, experts) * -0.3125


def with_images(routed: Routed, random) -> None:
    with_text(routed, random)
    routed.call["image_mask"] = on(random, len(routed.x))


def with_image_ids(routed: Routed, random, dtype=INT32) -> None:
    """Some of the token ids are in a hash layer's table, some are not, and some are beside both."""
    with_text(routed, random)
    routed.layer |= {"first_image_id": VOCAB - 20, "num_image_ids": 30}
    tokens = between(random, 0, VOCAB + 30, len(routed.x), dtype=dtype)
    # Cut to 32 bits these would be of images.
    far = on(random, len(routed.x), share=0.1 if dtype is torch.int64 else 0.0)
    routed.call["input_ids"] = torch.where(far, tokens + 2**32, tokens) if far.any() else tokens


def with_image_ids_of_int64(routed: Routed, random) -> None:
    with_image_ids(routed, random, torch.int64)


def with_forced(routed: Routed, random) -> None:
    """Half of the rows; one in eight of those is no choice."""
    tokens, experts = len(routed.x), routed.W.shape[1]
    order = torch.rand(tokens, experts, generator=random, device="cuda").argsort(1)
    ids = order[:, : routed.top_k].to(INT32)
    odd = torch.tensor([-1, experts, -(2**31), 2**31 - 1], dtype=INT32, device="cuda")
    spoiled = on(random, tokens, share=0.0625)
    ids[spoiled, -1] = odd[between(random, 0, 4, int(spoiled.sum())).long()]
    if routed.top_k > 1:
        twice = on(random, tokens, share=0.0625)
        ids[twice, -1] = ids[twice, 0]
    routed.call |= {"forced_ids": ids, "forced_mask": on(random, tokens)}


def all_forced(routed: Routed, random) -> None:
    """Every row, by int64 in rows of a wider tensor; some are outside but for their low words."""
    with_forced(routed, random)
    del routed.call["forced_mask"]
    ids = routed.call["forced_ids"].long()
    ids[on(random, len(ids), share=0.05), 0] += 2**32
    wide = torch.full((len(ids), routed.top_k + 3), -1, dtype=torch.int64, device="cuda")
    wide[:, 1 : routed.top_k + 1] = ids
    routed.call["forced_ids"] = wide[:, 1 : routed.top_k + 1]


def with_logical(routed: Routed, random) -> None:
    routed.asked += ("out_logical_ids",)


def with_logits(routed: Routed, random) -> None:
    routed.asked += ("out_logits",)


def with_bfloat16(routed: Routed, random) -> None:
    routed.weights_dtype = BF16


def with_temperature(routed: Routed, random) -> None:
    routed.layer["gate_temp"] = 1.3


def with_mask(routed: Routed, random) -> None:
    routed.call["padding_mask"] = on(random, len(routed.x), share=0.3)


def with_count(routed: Routed, random) -> None:
    routed.call["num_tokens"] = between(random, 0, len(routed.x) + 2, 1)


def with_int64(routed: Routed, random) -> None:
    routed.ids_dtype = torch.int64


def with_physical(routed: Routed, random) -> None:
    """Every (expert, replica) has an id of its own, so that logical ids can be had back."""
    experts = routed.W.shape[1]
    ids = torch.randperm(experts * REPLICAS, generator=random, device="cuda") + PHYSICAL
    routed.layer["to_physical"] = fenced(ids.view(experts, REPLICAS).to(INT32))
    routed.layer["logical_count"] = fenced(between(random, 1, REPLICAS + 1, experts))


def with_physical64(routed: Routed, random) -> None:
    with_physical(routed, random)
    for name in ("to_physical", "logical_count"):
        routed.layer[name] = fenced(routed.layer[name].long())


def with_shared(routed: Routed, random) -> None:
    routed.layer["num_shared_slots"] = 2


def with_shared_weight(routed: Routed, random) -> None:
    routed.layer |= {"num_shared_slots": 1, "shared_weight": 1 / SCALE}


def unnormed(routed: Routed, random) -> None:
    routed.layer["norm_topk_prob"] = False


def with_table(routed: Routed, random, dtype=INT32) -> None:
    """A hash layer; one token id in four is outside its table, some of them far."""
    tokens, experts = len(routed.x), routed.W.shape[1]
    order = torch.rand(VOCAB, experts, generator=random, device="cuda").argsort(1)
    routed.layer["tid2eid"] = order[:, : routed.top_k].to(dtype)
    routed.bias = None
    far = [-1, VOCAB, -(2**31), 2**31 - 1]
    # Cut to 32 bits these would be inside.
    far += [2**40, -(2**40), 2**32 + 1, -(2**32) + 1, 2**63 - 1] if dtype is torch.int64 else []
    outside = torch.tensor(far, dtype=dtype, device="cuda")
    picked = outside[between(random, 0, len(far), tokens).long()]
    inside = between(random, 0, VOCAB, tokens, dtype=dtype)
    routed.call["input_ids"] = torch.where(on(random, tokens, share=0.25), picked, inside)


def with_table_of_int64(routed: Routed, random) -> None:
    with_table(routed, random, torch.int64)


OPTIONS = {
    "text": with_text,
    "images": with_images,
    "image_ids": with_image_ids,
    "image_ids64": with_image_ids_of_int64,
    "temperature": with_temperature,
    "mask": with_mask,
    "count": with_count,
    "int64": with_int64,
    "bfloat16": with_bfloat16,
    "physical": with_physical,
    "physical64": with_physical64,
    "shared": with_shared,
    "shared_weight": with_shared_weight,
    "unnormed": unnormed,
    "forced": with_forced,
    "all_forced": all_forced,
    "logical": with_logical,
    "logits": with_logits,
    "hash": with_table,
    "hash64": with_table_of_int64,
}
# What excludes each other: only one of each of these at a time.
SECOND_BIAS, TABLE = ("text", "images", "image_ids", "image_ids64"), ("hash", "hash64")
VARIANTS = (("physical", "physical64"), ("shared", "shared_weight"), ("forced", "all_forced"))
WAYS_TO_SELECT = (*SECOND_BIAS, *TABLE)
# One of each variant, so that they go together.
REST = tuple(
    name
    for name in OPTIONS
    if name not in WAYS_TO_SELECT and name not in {second for _, second in VARIANTS}
)


def goes_together(names) -> bool:
    """Whether one layer and call may have these; logits of a hash layer need a second bias."""
    given = set(names)
    alone = any(len(given.intersection(ways)) > 1 for ways in (SECOND_BIAS, TABLE, *VARIANTS))
    logits = "logits" not in given or not given & set(TABLE) or given & set(SECOND_BIAS)
    return not alone and bool(logits)


SINGLES = [(name,) for name in OPTIONS]
PAIRS = [pair for pair in combinations(OPTIONS, 2) if goes_together(pair)]
FIRST_VARIANTS = tuple(first for first, _ in VARIANTS)
NO_LOGITS = tuple(name for name in REST if name != "logits")
ALL = [
    *(("images", *REST), ("hash64", *NO_LOGITS), ("images", "hash64", *REST)),
    *(("image_ids", *REST), ("image_ids64", "hash64", *REST)),
    ("text", "hash", "logits", "logical", "physical64", "shared_weight"),
]


def joined(options) -> str:
    return "+".join(options) or "none"


def fenced(tensor):
    """The same numbers amid poison, which a read out of bounds would bring to light."""
    flat = tensor.flatten()
    buffer = torch.full((flat.numel() + 64,), -12345, dtype=tensor.dtype, device=tensor.device)
    inside = buffer[32 : 32 + flat.numel()]
    inside.copy_(flat)
    return inside.view(tensor.shape)


def routed_with(
    random,
    options,
    num_tokens: int,
    layout: str = "kmajor",
    *,
    k: int = K,
    num_experts: int = E,
    top_k: int = TOP_K,
    draw=integers,
    spoiled: bool = True,
) -> Routed:
    """A batch with these options on."""
    x, W, bias = draw(random, num_tokens, k, num_experts, layout)
    routed = Routed(x=x, W=W, bias=bias, top_k=top_k)
    for name in options:
        OPTIONS[name](routed, random)
    if spoiled:
        routed.spoil()
    return routed


# ------------------------------------------------------------------ against the oracle


@pytest.mark.parametrize("options", [(), *SINGLES, *PAIRS, *ALL], ids=joined)
def test_options_alone_in_pairs_and_together(random, options):
    for num_tokens in TOKENS:
        for layout in LAYOUTS:
            about = f"{joined(options)}, N = {num_tokens}, {layout}"
            routed = routed_with(random, options, num_tokens, layout)
            routed.agrees(*routed.run(), about)


@pytest.mark.parametrize("options", [("hash",), ("images", "hash"), *ALL], ids=joined)
def test_shapes_of_layers_with_options(random, options):
    """Ragged E, few blocks of K, every top_k; K = 64 leaves most K splits nothing to add."""
    for k, num_experts, top_k in [
        (64, 8, 1),
        (192, 512, 2),
        (1088, 132, 3),
        (4096, 256, 6),
        (5120, 384, 6),
        (7168, 384, 8),
        (1024, 509, 7),
        (2048, 144, 4),
        (1024, 160, 5),
    ]:
        for num_tokens in (1, 20, 64, 70, 130, most_in_one_launch(num_experts) + 1):
            for layout in LAYOUTS:
                shape = {"k": k, "num_experts": num_experts, "top_k": top_k}
                about = f"{joined(options)}, N = {num_tokens}, {shape}, {layout}"
                routed = routed_with(random, options, num_tokens, layout, **shape)
                routed.agrees(*routed.run(), about)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [("images", "hash"), ("images", "hash64", "int64"), ALL[2]],
    ids=["int32", "int64", "all"],
)
def test_images_in_a_hash_layer(random, options, layout):
    """Of one Router: rows mixed, of images alone, of text alone, and a call without the mask."""
    for num_tokens in (*range(1, 66), 128, 193, 300, 385, 449, 961):
        about = f"N = {num_tokens}, {layout}"
        routed = routed_with(random, options, num_tokens, layout, spoiled=False)
        router = routed.router()
        clean, images = routed.x.clone(), routed.call["image_mask"]
        for kind, mask in (
            ("mixed", images.clone()),
            ("images", torch.ones_like(images)),
            ("text", torch.zeros_like(images)),
            ("no mask", None),
        ):
            routed.call.pop("image_mask", None)
            if mask is not None:
                routed.call["image_mask"] = images.copy_(mask)
            routed.x.copy_(clean)
            routed.spoil()
            routed.agrees(*routed.run(router), f"{about}, {kind}")


@pytest.mark.parametrize("num_tokens", [1, 16, 56, 64, 100, 400])
def test_token_ids_of_image_rows_are_not_looked_at(random, num_tokens):
    routed = routed_with(random, ("images", "hash64", "physical"), num_tokens, spoiled=False)
    routed.call["image_mask"].fill_(True)
    router, answers = routed.router(), []
    for token in (0, -1, VOCAB, 2**40, -(2**63)):
        routed.call["input_ids"].fill_(token)
        answers.append(routed.run(router))
    assert (answers[0][1] >= PHYSICAL).all()
    for weights, ids in answers[1:]:
        assert torch.equal(ids, answers[0][1])
        assert torch.equal(weights, answers[0][0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [("hash",), ("text", "hash")], ids=joined)
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 56, 100, 400])
def test_a_hash_layer_looks_at_the_chosen_experts_only(random, num_tokens, options, layout):
    """All tokens choose among 40 experts; the others' weights are NaN."""
    routed = routed_with(random, options, num_tokens, layout)
    table = routed.layer["tid2eid"]
    table.copy_(torch.rand(VOCAB, 40, generator=random, device="cuda").argsort(1)[:, :TOP_K] * 4)
    chosen = torch.arange(E, device="cuda") % 4 == 0
    routed.W[:, ~chosen] = torch.nan
    routed.agrees(*routed.run(), f"N = {num_tokens}, {layout}")


@pytest.mark.parametrize("num_tokens", [1, 40, 100, 400])
def test_a_hash_layers_nan_and_infinity(random, num_tokens):
    """A chosen expert that is NaN weighs nothing, one that is infinite counts as FLT_MAX."""
    routed = routed_with(random, ("hash",), num_tokens)
    routed.x[:, 0] = 2.0
    routed.spoil()
    for column, value in ((0, torch.nan), (1, torch.inf), (2, -torch.inf)):
        experts = routed.layer["tid2eid"][::5, column].long().unique()
        routed.W[0, experts] = value
    weights, ids = routed.run()
    routed.agrees(weights, ids, f"N = {num_tokens}")
    assert weights.isfinite().all()


def test_a_hash_layer_with_rows_of_a_wider_matrix(random):
    for num_tokens in (5, 64, 90, 400):
        routed = routed_with(random, ("hash",), num_tokens)
        wide = torch.full((E, K + 64), torch.nan, dtype=BF16, device="cuda")
        wide[:, :K] = routed.W.t()
        routed.W = wide[:, :K].t()
        x = torch.full((num_tokens, K + 8), torch.nan, dtype=BF16, device="cuda")
        x[:, :K] = routed.x
        routed.x = x[:, :K]
        router = routed.router()
        assert not router.weights_copied
        routed.agrees(*routed.run(router), f"N = {num_tokens}")


def test_a_hash_table_of_any_strides(random):
    routed = routed_with(random, ("hash64",), 64)
    table = routed.layer["tid2eid"]
    for view in (table.t().contiguous().t(), table.repeat(1, 2)[:, :TOP_K], table.int()):
        routed.layer["tid2eid"] = view
        routed.agrees(*routed.run(), f"strides {view.stride()}, {view.dtype}")


@pytest.mark.parametrize("num_tokens", [1, 64, 200, 400])
def test_a_hash_layers_table_does_not_change_with_the_callers(random, num_tokens):
    routed = routed_with(random, ("hash",), num_tokens)
    router, expected = routed.router(), routed.expected()
    routed.layer["tid2eid"].fill_(10**9)
    weights, ids = routed.run(router)
    assert torch.equal(ids, expected[1])
    assert torch.equal(weights, expected[0])


@pytest.mark.parametrize("gate_temp", [1e-3, 0.5, 0.7, 3.0, 1e30])
def test_gate_temperatures(random, gate_temp):
    """In a hash layer, where nothing is chosen by a key: all scores, from 0 to huge, in any mix."""
    for num_tokens in (1, 33, 100, 400):
        routed = routed_with(random, ("hash",), num_tokens)
        routed.layer["gate_temp"] = gate_temp
        routed.agrees(*routed.run(), f"N = {num_tokens}, gate_temp {gate_temp}")


@pytest.mark.parametrize("options", [("count",), ("count", "hash")], ids=joined)
def test_any_number_of_valid_tokens(random, options):
    for num_tokens in (1, 16, 33, 100, 300, 400):
        routed = routed_with(random, options, num_tokens, spoiled=False)
        router = routed.router()
        clean = routed.x.clone()
        counts = {-(2**31), -1, 0, 1, num_tokens - 1, num_tokens, num_tokens + 1, 2**31 - 1}
        # Prefill's token tiles of 64 and 128: whole ones are padding.
        for count in sorted(counts | {63, 64, 65, 128, 129}):
            routed.call["num_tokens"].fill_(count)
            routed.x.copy_(clean)
            routed.spoil()
            routed.agrees(*routed.run(router), f"{count} valid of {num_tokens}")


# ------------------------------------------------------------------ what changes on the device


@pytest.mark.parametrize(
    "options",
    [("physical",), ("physical64",), ("physical", "hash64", "shared"), ("physical64", "hash")],
    ids=joined,
)
def test_maps_written_after_binding_read_nothing_out_of_bounds(random, options):
    """Counts that no check sees again: the replica is held within the map, as the oracle has it."""
    bad = torch.tensor([0, -1, -(2**31), REPLICAS + 1, 1000, 2**31 - 1], dtype=INT32, device="cuda")
    for num_tokens in (1, 16, 64, 100, 200, 400):
        routed = routed_with(random, options, num_tokens)
        router = routed.router()
        experts = torch.arange(E, device="cuda")
        routed.layer["logical_count"].copy_(bad[experts % len(bad)])
        to_physical = routed.layer["to_physical"]
        to_physical.random_(-(2**31), 2**31 - 1, generator=random)
        if "physical64" in options:
            # Words that are not read.
            to_physical += 2**32
            routed.layer["logical_count"] += 2**33
        weights, ids = routed.run(router)
        routed.agrees(weights, ids, f"N = {num_tokens}")
        assert not (ids == -12345).any(), f"N = {num_tokens}: read beside the map"


class Replayed:
    """A captured call whose tensors are given new numbers between replays."""

    def __init__(self, routed: Routed, *, pdl: bool) -> None:
        self.routed = routed
        self.out = routed.outputs()
        routed.got = routed.optional_outputs()
        more = routed.call | routed.got
        # Kept, since the graph reads the tables that it copied.
        self.router = routed.router(pdl=pdl)
        self.graph = captured([lambda: self.router(routed.x, *self.out, **more)])

    def take(self, other: Routed) -> None:
        """Everything that is read in place; a hash layer's table is not."""
        mine = self.routed
        pairs = [(mine.x, other.x), (mine.W, other.W)]
        pairs += [(mine.bias, other.bias)] if mine.bias is not None else []
        for here, there in ((mine.call, other.call), (mine.layer, other.layer)):
            pairs += [
                (value, there[name])
                for name, value in here.items()
                if isinstance(value, torch.Tensor) and name != "tid2eid"
            ]
        for old, new in pairs:
            old.copy_(new)

    def replay(self):
        for out in (*self.out, *self.routed.got.values()):
            out.fill_(CANARY)
        self.graph.replay()
        torch.cuda.synchronize()
        return self.out


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 16, 40, 64, 65, 200, 400])
def test_graph_replays_with_other_masks_ids_and_maps(random, num_tokens, pdl):
    for options in (
        ("count",),
        ("mask", "images"),
        ("hash64", "count"),
        ("hash", "physical", "mask", "shared"),
        *ALL,
    ):
        replayed = Replayed(routed_with(random, options, num_tokens), pdl=pdl)
        for step in range(3):
            replayed.take(routed_with(random, options, num_tokens))
            weights, ids = replayed.replay()
            replayed.routed.agrees(weights, ids, f"{joined(options)}, replay {step}")


@pytest.mark.parametrize(
    "options",
    [
        *(("images", "mask", "count"), ("hash", "mask"), ("images", "hash", "mask")),
        *(("forced", "mask"), ("image_ids", "hash", "all_forced")),
    ],
    ids=joined,
)
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 100, 200, 400])
def test_pdl_with_inputs_that_the_kernel_before_writes(random, num_tokens, options):
    """hidden_states, masks and num_tokens may be the work of the launch right before."""
    batches = [routed_with(random, options, num_tokens) for _ in range(8)]
    first = batches[0]
    router = first.router(pdl=True)
    for batch in batches:
        # One layer, eight batches: what binds once is the first's.
        batch.W, batch.bias, batch.layer = first.W, first.bias, first.layer
        batch.x.nan_to_num_(0, 0, 0)
        batch.spoil()
    live = Routed(
        x=first.x.clone(),
        W=first.W,
        bias=first.bias,
        top_k=TOP_K,
        layer=first.layer,
        call={name: tensor.clone() for name, tensor in first.call.items()},
    )
    written = [name for name in live.call if name != "input_ids"]
    for last in ("x", *written):
        outs = [batch.outputs() for batch in batches]
        torch.cuda.synchronize()
        for batch, out in zip(batches, outs, strict=True):
            if "input_ids" in live.call:
                live.call["input_ids"].copy_(batch.call["input_ids"])
            # `last` is the launch right before the router's.
            for name in sorted(("x", *written), key=lambda name: name == last):
                here = live.x if name == "x" else live.call[name]
                here.copy_(batch.x if name == "x" else batch.call[name])
            router(live.x, *out, **live.call)
        torch.cuda.synchronize()
        for number, (batch, (weights, ids)) in enumerate(zip(batches, outs, strict=True)):
            about = f"{joined(options)}, batch {number}, {last} written last"
            batch.agrees(weights, ids, about)


def test_back_to_back_dependents_of_every_kind(random):
    """With pdl, 100 launches in a row, hash layers among full gates, scratch shared."""
    kinds = [
        *(("images", "mask"), ("hash",), ("physical", "count")),
        *(("hash64", "physical"), ("images", "hash"), ()),
    ]
    layers = [
        routed_with(random, options, num_tokens, draw=gaussian)
        for options in kinds
        for num_tokens in (1, 16, 40, 64, 100, 200)
    ]
    expected = [routed.run(rows=0, columns=0) for routed in layers]
    routers = [routed.router(pdl=True) for routed in layers]
    outs = [[routed.outputs() for routed in layers] for _ in range(5)]
    torch.cuda.synchronize()
    for out in outs:
        for router, routed, one in zip(routers, layers, out, strict=True):
            router(routed.x, *one, **routed.call)
    torch.cuda.synchronize()
    for out in outs:
        for got, wanted in zip(out, expected, strict=True):
            assert torch.equal(got[0], wanted[0])
            assert torch.equal(got[1], wanted[1])


# ------------------------------------------------------------------ bits


def logical(routed: Routed, ids):
    """Ids with physical ones turned back into experts; others are left as they are."""
    if "to_physical" not in routed.layer:
        return ids
    physical = routed.layer["to_physical"].long()
    expert_of = torch.arange(PHYSICAL + physical.numel(), device=ids.device)
    experts = torch.arange(len(physical), device=ids.device)[:, None]
    expert_of[physical.flatten()] = experts.expand_as(physical).flatten()
    return torch.where(ids >= PHYSICAL, expert_of[ids.long().clamp(min=0)], ids)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [(), *SINGLES, *ALL], ids=joined)
def test_a_tokens_bits_do_not_depend_on_its_batch(random, options, layout):
    """Every token alone, and then in every number of tokens up to 64 and some more, shuffled.

    A row past num_tokens is padding wherever it comes from, and is left out.
    """
    batch = routed_with(random, options, 64, layout, k=2048, num_experts=256, draw=gaussian)
    router = batch.router()
    count = batch.call.pop("num_tokens", None)
    # Only now, so that it is the mask and the token ids that say which rows are padding.
    padded = batch.padded()
    batch.x = torch.randn(*batch.x.shape, generator=random, device="cuda").to(BF16)
    batch.spoil()

    def route(rows):
        valid = len(rows)
        call = {name: tensor[rows] for name, tensor in batch.call.items()}
        if count is not None:
            valid = max(1, len(rows) - len(rows) // 4)
            call["num_tokens"] = count.new_full((1,), valid)
        part = Routed(
            x=batch.x[rows],
            W=batch.W,
            bias=batch.bias,
            top_k=batch.top_k,
            layer=batch.layer,
            call=call,
            ids_dtype=batch.ids_dtype,
        )
        weights, ids = part.outputs()
        router(part.x, weights, ids, **call)
        assert (ids[valid:] == -1).all()
        assert (weights[valid:] == 0).all()
        return weights[:valid], logical(part, ids[:valid])

    everyone = torch.arange(64, device="cuda")
    alone = [route(everyone[row : row + 1]) for row in range(64)]
    weights = torch.cat([w for w, _ in alone])
    ids = torch.cat([i for _, i in alone])
    assert (ids[padded] == -1).all()
    assert (ids[~padded] >= 0).all()
    for num_tokens in (*range(2, 66), 100, 128, 129, 192, 193, 300):
        rows = torch.randperm(max(64, num_tokens), generator=random, device="cuda") % 64
        got_weights, got_ids = route(rows[:num_tokens])
        rows = rows[: len(got_ids)]
        assert torch.equal(got_ids, ids[rows]), f"{joined(options)}: ids at N = {num_tokens}"
        assert torch.equal(got_weights, weights[rows]), (
            f"{joined(options)}: weights at N = {num_tokens}"
        )


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 100, 300, 400])
def test_every_run_gives_the_same_bits(random, num_tokens):
    for options in ALL:
        routed = routed_with(random, options, num_tokens, draw=gaussian)
        weights, ids = routed.run()
        for router in (routed.router(), routed.router(pdl=True)):
            for _ in range(3):
                again = routed.run(router)
                assert torch.equal(again[0], weights), joined(options)
                assert torch.equal(again[1], ids), joined(options)


@pytest.mark.parametrize("num_tokens", [1, 16, 33, 64, 65, 300, 400])
def test_options_that_change_nothing_change_no_bit(random, num_tokens):
    """On, but without effect: no row masked, all of them valid, replicas alike, bias_vl unused."""
    routed = routed_with(random, (), num_tokens, draw=gaussian)
    weights, ids = routed.run()
    experts = torch.arange(E, dtype=INT32, device="cuda")
    no_row = torch.zeros(num_tokens, dtype=torch.bool, device="cuda")
    routed.layer = {
        "bias_vl": -routed.bias,
        "gate_temp": 1.0,
        "to_physical": experts[:, None].expand(E, 2).contiguous(),
        "logical_count": torch.full_like(experts, 2),
        "shared_weight": 0.5,
        "first_image_id": 1,
        "num_image_ids": 2**31 - 1,
    }
    # A product into out_logits may be summed in another order than one into scratch.
    both = num_tokens <= most_in_one_launch(E)
    routed.asked = ("out_logical_ids", "out_logits") if both else ("out_logical_ids",)
    routed.call = {
        "image_mask": no_row,
        "padding_mask": no_row.clone(),
        "input_ids": torch.zeros(num_tokens, dtype=INT32, device="cuda"),
        "forced_ids": torch.full((num_tokens, TOP_K), -1, dtype=INT32, device="cuda"),
        "forced_mask": no_row.clone(),
        "num_tokens": torch.tensor([num_tokens], dtype=INT32, device="cuda"),
    }
    again = routed.run()
    assert torch.equal(again[0], weights)
    assert torch.equal(again[1], ids)


# ------------------------------------------------------------------ any options on any shape


def promised(routed: Routed, weights, ids) -> None:
    """Distinct ids in range, weights finite and summing to the scale, padding as it should be."""
    top_k, experts = routed.top_k, routed.W.shape[1]
    padded = routed.padded()
    assert (ids[padded] == -1).all()
    assert (weights[padded] == 0).all()
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    chosen = logical(routed, ids)[~padded][:, :top_k].long()
    assert ((chosen >= 0) & (chosen < experts)).all()
    assert (chosen.sort(1)[0].diff(dim=1) > 0).all()
    slots = torch.arange(routed.columns - top_k, device=ids.device)
    assert (ids[~padded][:, top_k:] == experts + slots).all()
    shared = weights.new_tensor(routed.layer.get("shared_weight", 1.0))
    assert (weights[~padded][:, top_k:] == shared).all()
    if "forced_ids" in routed.call:
        forced = routed.forced()[~padded]
        assert torch.equal(chosen[forced], routed.call["forced_ids"][~padded][forced].long())
    if "tid2eid" in routed.layer:
        text = ~(routed.images() | routed.forced())[~padded]
        tokens = routed.call["input_ids"][~padded][text].long()
        assert torch.equal(chosen[text], routed.layer["tid2eid"].long()[tokens])
    if routed.layer.get("norm_topk_prob", True):
        sums = weights[~padded][:, :top_k].double().sum(1)
        # Below it where every score of a row vanishes beside the epsilon, NaN being 0.
        tolerance = 1e-5 if weights.dtype is torch.float32 else SCALE * 2**-8
        assert ((sums - SCALE).abs() < tolerance).logical_or(sums < SCALE).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    num_tokens=st.one_of(st.integers(0, 80), st.integers(65, 400)),
    blocks=st.integers(1, 20),
    num_experts=st.integers(1, 512),
    top_k=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    bias=st.sampled_from(["none", *SECOND_BIAS]),
    table=st.sampled_from(["none", *TABLE]),
    rest=st.sets(st.sampled_from([name for name in REST if name not in FIRST_VARIANTS])),
    variants=st.tuples(*(st.sampled_from(["none", *ways]) for ways in VARIANTS)),
    spare=st.tuples(st.integers(0, 3), st.integers(0, 5)),
    odd=st.sampled_from([0.0, 0.0, 0.001, 0.1]),
    pdl=st.booleans(),
    number=st.integers(0, 2**31),
)
def test_any_options_on_any_shape(
    num_tokens, blocks, num_experts, top_k, layout, bias, table, rest, variants, spare, odd, pdl,
    number,
):  # fmt: skip
    """Integers, some of them replaced by NaN and infinities."""
    random = torch.Generator(device="cuda").manual_seed(number)
    shape = {"k": 64 * blocks, "num_experts": num_experts, "top_k": min(top_k, num_experts)}
    options = [name for name in OPTIONS if name in {bias, table, *rest, *variants}]
    if not goes_together(options):
        options.remove("logits")
    routed = routed_with(random, options, num_tokens, layout, **shape)
    for value in (torch.nan, torch.inf, -torch.inf):
        routed.x[on(random, *routed.x.shape, share=odd)] = value
    torch.cuda.synchronize()
    weights, ids = routed.run(routed.router(pdl=pdl), *spare)
    promised(routed, weights, ids)
    routed.agrees(weights, ids, f"{joined(options)}, N = {num_tokens}, {shape}, {layout}")


# ------------------------------------------------------------------ what engines record and replay

DECODE_AND_MORE = [1, 8, 33, 64, 65, 130, 300, 400]
# A text layer and hash layers, by the kernels that they take.
KINDS = [(), ("hash",), ("text", "hash"), ("images", "hash"), ("image_ids", "hash64"), ("images",)]


@pytest.mark.parametrize("kind", KINDS, ids=joined)
@pytest.mark.parametrize("num_tokens", DECODE_AND_MORE)
def test_bfloat16_weights_are_the_fp32_ones_rounded(random, num_tokens, kind):
    """To nearest even, for any weights: gaussian logits, and shared experts that weigh 0.4."""
    options = (*kind, "shared_weight", "mask", "forced")
    routed = routed_with(random, options, num_tokens, draw=gaussian)
    router = routed.router()
    weights, ids = routed.run(router)
    routed.weights_dtype = BF16
    narrow, same = routed.run(router)
    assert torch.equal(narrow, weights.to(BF16))
    assert torch.equal(ids, same)


@pytest.mark.parametrize("kind", KINDS, ids=joined)
@pytest.mark.parametrize("num_tokens", DECODE_AND_MORE)
def test_ids_that_were_recorded_give_the_same_bits_when_forced(random, num_tokens, kind):
    """The logical ids of a run, forced in the next: same weights, same physical ids."""
    routed = routed_with(random, (*kind, "physical", "mask", "logical"), num_tokens, draw=gaussian)
    router = routed.router()
    weights, ids = routed.run(router)
    recorded = routed.got["out_logical_ids"].clone()
    routed.call["forced_ids"] = recorded
    for others in (False, True):
        if others:
            # Rows that are not forced select as before.
            rows = on(random, num_tokens)
            routed.call["forced_mask"] = rows
            recorded[~rows] = -1
        again = routed.run(router)
        assert torch.equal(again[0], weights)
        assert torch.equal(again[1], ids)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != ("hash",)], ids=joined)
@pytest.mark.parametrize("num_tokens", DECODE_AND_MORE)
def test_logits_of_every_row_and_calls_without_them(random, num_tokens, kind, layout):
    """Before gate_temp, padded rows too; the same ids with them as without, before and after."""
    options = (*kind, "temperature", "mask", "logits")
    routed = routed_with(random, options, num_tokens, layout, draw=gaussian, spoiled=False)
    router = routed.router()
    exact, magnitudes = exact_logits(routed.x, routed.W), logits_of(routed.x.abs(), routed.W.abs())
    plain = replace(routed, asked=())
    before = plain.run(router)
    for columns in (0, 3):
        weights, ids = routed.run(router, columns=columns)
        logits = routed.got["out_logits"]
        # cuBLAS sums in an order of its own, and another for rows of another stride.
        is_product = num_tokens > most_in_one_launch(E)
        order_error = 2**-14 * magnitudes if is_product else 0
        assert ((logits.double() - exact.double()).abs() <= order_error).all()
        expected = routed.selected(logits)
        assert torch.equal(weights, expected[0])
        assert torch.equal(ids, expected[1])
        if not is_product:
            assert torch.equal(weights, before[0])
            assert torch.equal(ids, before[1])
    after = plain.run(router)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("num_tokens", [8, 100, 400])
def test_logits_in_inference_mode_and_out_of_it(random, num_tokens):
    routed = routed_with(random, ("logits",), num_tokens)
    router = routed.router()
    with torch.inference_mode():
        made = routed.optional_outputs()
        out = routed.outputs()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            router(routed.x, *out, **made)
        assert torch.equal(made["out_logits"].double(), logits_of(routed.x, routed.W))


# ------------------------------------------------------------------ the callers' side


@pytest.mark.parametrize("options", ALL, ids=joined)
def test_no_tokens(random, options):
    routed = routed_with(random, options, 0)
    weights, _ = routed.run()
    assert len(weights) == 0


@pytest.mark.parametrize("num_tokens", [6, 200])
def test_refused_calls_touch_nothing(random, num_tokens):
    rows = torch.zeros(num_tokens, dtype=torch.bool, device="cuda")
    plain = routed_with(random, (), num_tokens)
    hashed = routed_with(random, ("hash",), num_tokens)
    mixed = routed_with(random, ("images", "hash"), num_tokens)
    tokens = hashed.call["input_ids"]
    for routed, wrong in (
        (plain, {"image_mask": rows}),
        (plain, {"padding_mask": rows[1:]}),
        (plain, {"padding_mask": rows.cpu()}),
        (plain, {"padding_mask": rows.int()}),
        (plain, {"num_tokens": 3}),
        (plain, {"num_tokens": torch.tensor([3, 3], dtype=INT32, device="cuda")}),
        (plain, {"input_ids": tokens}),
        (plain, {"forced_mask": rows}),
        (plain, {"forced_ids": tokens}),
        (plain, {"out_logits": torch.zeros(num_tokens, E - 1, device="cuda")}),
        (hashed, {"input_ids": tokens, "out_logits": torch.zeros(num_tokens, E, device="cuda")}),
        (hashed, {}),
        (hashed, {"input_ids": tokens[1:]}),
        (hashed, {"input_ids": tokens.float()}),
        (hashed, {"input_ids": tokens, "image_mask": rows}),
        (mixed, {"image_mask": rows}),
    ):
        weights, ids = routed.outputs()
        with pytest.raises((TypeError, ValueError)):
            routed.router()(routed.x, weights, ids, **wrong)
        torch.cuda.synchronize()
        assert (weights == CANARY).all()
        assert (ids == CANARY).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("hash",), "tid2eid would have to be read and copied"),
        (("physical",), "to_physical and logical_count would have to be read"),
    ],
)
def test_tables_are_not_bound_under_capture(random, options, message):
    routed = routed_with(random, options, 6)
    routed.router()
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match=message),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        routed.router()


def test_an_e_contiguous_gate_of_a_hash_layer_is_bound_as_a_copy(random):
    routed = routed_with(random, ("hash",), 16, "emajor")
    router = routed.router()
    assert router.weights_copied
    routed.agrees(*routed.run(router), "copied")
    routed.W.neg_()
    with pytest.raises(ValueError, match="modified in place"):
        routed.run(router)
    in_place = routed_with(random, ("hash",), 16)
    router = in_place.router()
    in_place.W.neg_()
    in_place.agrees(*in_place.run(router), "read in place")


def test_dense_router_dispatch_writes_int64_ids(random):
    for num_tokens in (6, 200, 400):
        routed = routed_with(random, ("int64",), num_tokens)
        weights, ids = routed.outputs()
        dense_router_dispatch(routed.x, routed.W, routed.bias, SCALE, TOP_K, weights, ids)
        routed.agrees(weights, ids, f"N = {num_tokens}")


def test_int64_ids_beside_weights_in_one_buffer(random):
    for num_tokens in (1, 40, 200, 400):
        routed = routed_with(random, ("int64",), num_tokens)
        buffer = torch.full((num_tokens, 12), CANARY, dtype=torch.int64, device="cuda")
        weights, ids = buffer.view(torch.float32)[:, 1:7], buffer[:, 5:11]
        routed.router()(routed.x, weights, ids)
        routed.agrees(weights, ids, f"N = {num_tokens}")
        assert (buffer[:, [4, 11]] == CANARY).all()


def test_no_memory_is_allocated_per_call(random):
    batches = [
        routed_with(random, options, num_tokens)
        for options in ALL
        for num_tokens in (1, 16, 64, 100, 200, 400)
    ]
    calls = [(batch.router(), batch, batch.outputs()) for batch in batches]
    for router, batch, out in calls:
        router(batch.x, *out, **batch.call)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for router, batch, out in calls * 3:
        router(batch.x, *out, **batch.call)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_layouts_agree_to_the_last_bit_on_integers(random):
    """Exact logits leave no room for the layout: both must give the same bits."""
    for options, num_tokens in product(ALL, (64, 130, 300)):
        routed = routed_with(random, options, num_tokens)
        weights, ids = routed.run()
        routed.W = laid_out(routed.W, "emajor")
        again = routed.run()
        assert torch.equal(again[0], weights), joined(options)
        assert torch.equal(again[1], ids), joined(options)
