"""A trust policy: what it accepts, and the table of what it has to refuse."""

from __future__ import annotations

import base64
import copy
import json
import os
import pickle
from collections.abc import Callable
from hashlib import sha512
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("cryptography", reason="needs the extra `test`")

import signed_sets as sets
from cpu_time import best_ms
from signed_sets import IDS, KEYS, ORDER, PUBLIC, b64, policy, signed
from test_ed25519 import SMALL
from test_files import SPECIAL
from watchdog import ends_within

from dsv4_router_runtime.artifacts import dsse
from dsv4_router_runtime.artifacts import folder as folder_module
from dsv4_router_runtime.artifacts.dsse import parse_envelope
from dsv4_router_runtime.artifacts.folder import find_artifacts, open_artifacts, subjects
from dsv4_router_runtime.artifacts.statement import PAYLOAD_TYPE
from dsv4_router_runtime.artifacts.trust import TRUST_VARIABLE, read_policy
from dsv4_router_runtime.errors import ArtifactError, TrustError

World = SimpleNamespace


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)


@pytest.fixture
def world(manifest, write_artifacts) -> World:
    """A set of one kernel that key 0 signed as release 0.1.0, and a policy that trusts key 0."""
    manifest = sets.small_manifest(manifest)
    folder = write_artifacts(manifest)
    statement = sets.statement(manifest)
    world = World(
        folder=folder,
        file=folder / "manifest.dsse.json",
        manifest=manifest,
        statement=statement,
        payload=json.dumps(statement).encode(),
        trust=policy(0),
    )
    world.write = lambda document: world.file.write_text(json.dumps(document))
    world.sign = lambda *numbers, **more: world.write(signed(world.payload, numbers, **more))
    world.sign(0)
    return world


def opened(world: World, **more: Any) -> Any:
    """Open the set and take every byte that a server would."""
    artifacts = open_artifacts(world.folder, trust=world.trust, **more)
    for kernel in artifacts.manifest.kernels:
        artifacts.read(kernel)
    return artifacts


def edit(world: World, change: Callable[[dict[str, Any]], object], *numbers: int) -> None:
    """Change the statement, and let keys sign what came of it."""
    statement = copy.deepcopy(world.statement)
    change(statement)
    world.payload = json.dumps(statement).encode()
    world.sign(*(numbers or (0,)))


def edit_envelope(world: World, change: Callable[[dict[str, Any]], object]) -> None:
    document = signed(world.payload)
    change(document)
    world.write(document)


def definition(statement: dict[str, Any]) -> dict[str, Any]:
    return statement["predicate"]["buildDefinition"]


def set_signature(data: bytes) -> Callable[[World], None]:
    return lambda w: edit_envelope(w, lambda e: e["signatures"][0].update(sig=b64(data)))


def by_signature(change: Callable[[bytes], bytes]) -> Callable[[World], None]:
    def mutate(world: World) -> None:
        (one,) = signed(world.payload)["signatures"]
        set_signature(change(base64.b64decode(one["sig"])))(world)

    return mutate


def trust(value: Any) -> Callable[[World], None]:
    return lambda world: setattr(world, "trust", value)


def trust_with(*numbers: int, **more: Any) -> Callable[[World], None]:
    return trust(policy(*(numbers or (0,)), **more))


def policy_file(text: str) -> Callable[[World], None]:
    def mutate(world: World) -> None:
        world.trust = world.folder.parent / "policy.json"
        world.trust.write_text(text)

    return mutate


def rewritten_manifest(world: World) -> None:
    path = world.folder / "manifest.json"
    path.write_text(path.read_text().replace('"nvrtc": "13.0"', '"nvrtc": "13.1"'))


def rewritten_set(world: World) -> None:
    """Another cubin with a manifest that lists it, as somebody who rewrites a wheel would do."""
    kernel = world.manifest.kernels[0]
    data = (world.folder / kernel.file).read_bytes() + b"evil"
    (world.folder / kernel.file).write_bytes(data)
    path = world.folder / "manifest.json"
    digest = folder_module.hashlib.sha256(data).hexdigest()
    path.write_text(path.read_text().replace(kernel.cubin_sha256, digest))


def altered_cubin(world: World) -> None:
    path = world.folder / world.manifest.kernels[0].file
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def signed_raw(world: World) -> None:
    set_signature(KEYS[0].sign(world.payload))(world)


def signed_other_length(world: World) -> None:
    """PAE says how long the type and the payload are: a boundary cannot be moved."""
    kind, payload = PAYLOAD_TYPE.encode(), world.payload
    moved = b"DSSEv1 %d %b %d %b" % (len(kind) - 1, kind, len(payload), payload)
    set_signature(KEYS[0].sign(moved))(world)


def twice(world: World) -> None:
    world.trust = policy(0, 1, threshold=2)
    edit_envelope(world, lambda e: e["signatures"].append(dict(e["signatures"][0])))


def twice_by_two_names(world: World) -> None:
    world.trust = policy(0, 1, threshold=2)
    again = dict(signed(world.payload)["signatures"][0], keyid=IDS[1])
    edit_envelope(world, lambda e: e["signatures"].append(again))


def many(world: World) -> None:
    more = [{"keyid": f"{n}", "sig": ""} for n in range(16)]
    edit_envelope(world, lambda e: e["signatures"].extend(more))


def huge(world: World) -> None:
    world.file.write_text(json.dumps(signed(world.payload)) + " " * dsse.MAX_ENVELOPE_BYTES)


def key_written(text: object) -> Callable[[World], None]:
    return trust({"keys": [text]})


def small_r(world: World) -> None:
    """R is the neutral element and S = k a, so that the equation holds: OpenSSL accepts it."""
    r = (1).to_bytes(32, "little")
    message = parse_envelope(world.file.read_bytes(), source="e").signed_bytes
    secret = sha512(KEYS[0].private_bytes_raw()).digest()[:32]
    a = int.from_bytes(secret, "little") & (2**254 - 8) | 2**254
    k = int.from_bytes(sha512(r + PUBLIC[0] + message).digest(), "little")
    signature = r + (k * a % ORDER).to_bytes(32, "little")
    KEYS[0].public_key().verify(signature, message)
    set_signature(signature)(world)


def s_and_order(data: bytes) -> bytes:
    s = int.from_bytes(data[32:], "little") + ORDER
    return data[:32] + s.to_bytes(32, "little")


S_IS_L = ORDER.to_bytes(32, "little")
NO_KEY = "no key of the policy"
WRONG = "its signature is wrong"
BAD = "no trust policy: "
# Name -> what is done to a world in which all is well, and words of the refusal.
REFUSED: dict[str, tuple[Callable[[World], object], str]] = {
    # Signatures
    "another key": (lambda w: w.sign(1), NO_KEY),
    "another key under the trusted name": (
        lambda w: edit_envelope(
            w,
            lambda e: e["signatures"][0].update(sig=signed(w.payload, [1])["signatures"][0]["sig"]),
        ),
        WRONG,
    ),
    "no signature": (lambda w: w.sign(), "expected 1 to 16 signatures (got 0)"),
    "a signature of no bytes": (set_signature(b""), WRONG),
    "a cut signature": (by_signature(lambda data: data[:63]), WRONG),
    "a longer signature": (by_signature(lambda data: data + b"\0"), WRONG),
    "a flipped bit in R": (by_signature(lambda data: bytes([data[0] ^ 1]) + data[1:]), WRONG),
    "a flipped bit in S": (by_signature(lambda d: d[:40] + bytes([d[40] ^ 1]) + d[41:]), WRONG),
    "S + L": (by_signature(s_and_order), WRONG),
    "S = L": (by_signature(lambda data: data[:32] + S_IS_L), WRONG),
    "R of small order": (small_r, WRONG),
    "all zero": (set_signature(bytes(64)), WRONG),
    "all one": (set_signature(b"\xff" * 64), WRONG),
    "a signature of the payload alone": (signed_raw, WRONG),
    "a boundary of PAE moved": (signed_other_length, WRONG),
    "fewer than the threshold": (
        trust_with(0, 1, threshold=2),
        "1 of 2 signatures by trusted keys (no other",
    ),
    "one signature twice": (twice, f"two signatures have the keyid {IDS[0]}"),
    "one signature by two names": (twice_by_two_names, WRONG),
    "a trusted and a foreign one under a threshold of 2": (
        lambda w: (w.sign(0, 2), trust_with(0, 1, threshold=2)(w)),
        NO_KEY,
    ),
    "a keyid in capitals": (
        lambda w: edit_envelope(w, lambda e: e["signatures"][0].update(keyid=IDS[0].upper())),
        NO_KEY,
    ),
    "no keyid": (lambda w: edit_envelope(w, lambda e: e["signatures"][0].pop("keyid")), "missing"),
    "17 signatures": (many, "expected 1 to 16 signatures (got 17)"),
    "a revoked key": (trust_with(0, revoked=[IDS[0]]), "revoked"),
    "a revoked key among others": (
        lambda w: (w.sign(0, 1), trust_with(0, 1, threshold=2, revoked=[IDS[1]])(w)),
        "revoked",
    ),
    # Payloads and what they name
    "an altered payload": (
        lambda w: edit_envelope(w, lambda e: e.update(payload=b64(w.payload + b" "))),
        WRONG,
    ),
    "another payload type, signed": (
        lambda w: w.sign(0, payload_type="application/json"),
        "payloadType: expected application/vnd.in-toto+json (got application/json)",
    ),
    "another payload type, not signed": (
        lambda w: edit_envelope(w, lambda e: e.update(payloadType="application/json")),
        "payloadType",
    ),
    "a payload that is no JSON": (
        lambda w: (setattr(w, "payload", b"\xff\0"), w.sign(0)),
        "not valid JSON",
    ),
    "another statement type": (
        lambda w: edit(w, lambda s: s.update(_type="https://in-toto.io/Statement/v0.1")),
        "_type: expected one of",
    ),
    "another predicate": (
        lambda w: edit(w, lambda s: s.update(predicateType="https://slsa.dev/verification/v1")),
        "predicateType: expected one of",
    ),
    "another build type": (
        lambda w: edit(w, lambda s: definition(s).update(buildType="urn:x-other")),
        "buildType: expected one of",
    ),
    "an altered manifest": (rewritten_manifest, "manifest.json: sha256 is"),
    "an altered cubin": (altered_cubin, "altered or truncated"),
    "a rewritten set": (rewritten_set, "manifest.json: sha256 is"),
    "a statement that leaves the manifest out": (
        lambda w: edit(w, lambda s: s["subject"].pop(0)),
        "that of no file in the signed statement",
    ),
    "a statement of one more cubin": (
        lambda w: edit(w, lambda s: s["subject"].append(dict(s["subject"][0], name="z.cubin"))),
        "z.cubin: sha256 is that of no file here",
    ),
    "a statement that names the manifest twice": (
        lambda w: edit(w, lambda s: s["subject"].append(s["subject"][0])),
        "manifest.json is named twice",
    ),
    "a statement with a digest in capitals": (
        lambda w: edit(w, lambda s: s["subject"][0]["digest"].update(sha256="A" * 64)),
        "64 lower-case hex digits",
    ),
    "a statement without a release": (
        lambda w: edit(w, lambda s: definition(s)["externalParameters"].pop("release")),
        "release: missing",
    ),
    "an older release": (trust_with(min_release="0.1.1"), "rolled back: min_release is 0.1.1"),
    "0.9 where 0.10 is the oldest": (
        lambda w: (
            edit(w, lambda s: definition(s)["externalParameters"].update(release="0.9")),
            trust_with(min_release="0.10")(w),
        ),
        "release 0.9 is rolled back",
    ),
    "a release that cannot be compared": (
        lambda w: edit(w, lambda s: definition(s)["externalParameters"].update(release="1.0rc1")),
        "a release of 1 to 4 numbers",
    ),
    "a revoked manifest": (
        lambda w: trust_with(revoked=[w.statement["subject"][0]["digest"]["sha256"]])(w),
        "is revoked",
    ),
    # Envelopes
    "no envelope": (lambda w: w.file.unlink(), "missing, so nobody signed"),
    "an empty envelope": (lambda w: w.file.write_text(""), "not valid JSON"),
    "an envelope that is no JSON": (lambda w: w.file.write_text("{"), "not valid JSON"),
    "an envelope that is a list": (lambda w: w.file.write_text("[]"), "expected an object"),
    "an envelope without a payload": (
        lambda w: edit_envelope(w, lambda e: e.pop("payload")),
        "payload: missing",
    ),
    "a payload written twice": (
        lambda w: w.file.write_text(w.file.read_text().replace("{", '{"payload": "",', 1)),
        "is written twice",
    ),
    "base64 of both alphabets": (
        lambda w: edit_envelope(w, lambda e: e["signatures"][0].update(sig="+-" * 43 + "==")),
        "expected canonical base64",
    ),
    "base64 with a line break": (
        lambda w: edit_envelope(w, lambda e: e.update(payload=e["payload"] + "\n")),
        "expected canonical base64",
    ),
    "base64 without its padding": (
        lambda w: edit_envelope(w, lambda e: e["signatures"][0].update(sig="A" * 86)),
        "expected canonical base64",
    ),
    "base64 with bits to spare": (
        lambda w: edit_envelope(w, lambda e: e["signatures"][0].update(sig="A" * 85 + "B==")),
        "expected canonical base64",
    ),
    "a payload that is a number": (
        lambda w: edit_envelope(w, lambda e: e.update(payload=5)),
        "expected canonical base64",
    ),
    "a huge envelope": (huge, "bytes; at most 1048576 are read"),
    # Policies
    "a policy without keys": (trust({}), f"{BAD}keys: missing"),
    "a policy of no keys": (trust({"keys": []}), "expected 1 to 16 keys"),
    "a policy of 17 keys": (
        lambda w: trust({"keys": [b64(k) for k in some_keys(17)]})(w),
        "expected 1 to 16 keys",
    ),
    "the same key twice": (trust_with(0, 0, threshold=2), "the same key once more"),
    "an unknown key of the policy": (trust_with(warn_only=True), 'unknown key "warn_only"'),
    "a threshold of 0": (trust_with(threshold=0), "threshold: expected an int from 1 to 1"),
    "a threshold beyond the keys": (trust_with(threshold=2), "expected an int from 1 to 1"),
    "a threshold that is true": (trust_with(threshold=True), "threshold: expected an int"),
    "a threshold in a string": (trust_with(threshold="1"), "threshold: expected an int"),
    "min_release null": (trust_with(min_release=None), "min_release: expected a release"),
    "min_release with a letter": (trust_with(min_release="v0.1"), "min_release: expected a"),
    "revoked that is a string": (trust_with(revoked=IDS[1]), "revoked: expected a list"),
    "513 revoked": (trust_with(revoked=["0" * 64] * 513), "expected at most 512 sha256 (got 513)"),
    "revoked that is no sha256": (trust_with(revoked=["key 1"]), "revoked[0]: expected the sha"),
    "a key of 31 bytes": (key_written(b64(bytes(31))), "expected 32 bytes (got 31)"),
    "a key in hex": (key_written("9" * 64), "expected 32 bytes (got 48)"),
    "a key that is null": (key_written(None), "keys[0]: expected canonical base64"),
    "a key that is no point": (
        key_written(b64((2).to_bytes(32, "little"))),
        "the canonical encoding of a point",
    ),
    "a key that is not canonical": (
        key_written(b64((2**255 - 18).to_bytes(32, "little"))),
        "the canonical encoding of a point",
    ),
    **{
        f"a key of small order, {hex(y)[:6]}": (
            key_written(b64(y.to_bytes(32, "little"))),
            "a point of small order",
        )
        for y in SMALL[:5]
    },
    "a policy file that is not there": (trust("/no/policy.json"), "No such file"),
    "an empty path": (trust(""), "got an empty string"),
    "a path with a NUL": (trust("a\0b"), "embedded null"),
    "a policy file that is empty": (policy_file(""), "not valid JSON"),
    "a policy file with a comment": (policy_file("# keys\n{}"), "not valid JSON"),
    "a policy file that is a list": (policy_file("[]"), "expected an object"),
    "a policy file with a key twice": (
        policy_file('{"keys": [], "keys": []}'),
        'the key "keys" is written twice',
    ),
    "a huge policy file": (policy_file(" " * 65537), "at most 65536 are read"),
    "another manifest is pinned": (trust("0" * 64), "allows " + "0" * 64 + " alone"),
    "a pin that is a path": (
        lambda w: trust(Path(w.statement["subject"][0]["digest"]["sha256"]))(w),
        "No such file",
    ),
    "a pin in capitals": (
        lambda w: trust(w.statement["subject"][0]["digest"]["sha256"].upper())(w),
        "No such file",
    ),
}


def some_keys(number: int) -> list[bytes]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    made = (Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in range(number))
    return [key.public_key().public_bytes_raw() for key in made]


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_policy_refuses(world, name):
    mutate, words = REFUSED[name]
    opened(world)
    mutate(world)
    with pytest.raises(ArtifactError) as caught:
        opened(world)
    error = caught.value
    assert words in error.problem
    assert isinstance(error, TrustError) or name == "an altered cubin"
    assert error.next_step in str(error)


def test_the_table_has_what_was_asked_for():
    assert len(REFUSED) >= 35


@pytest.mark.parametrize(("make", "words"), SPECIAL, ids=[make.__name__ for make, _ in SPECIAL])
def test_an_envelope_or_a_policy_that_is_no_small_regular_file(world, make, words):
    for path in (world.file, world.folder.parent / "policy.json"):
        path.unlink(missing_ok=True)
        make(path)
        if path != world.file:
            world.trust = path
        with ends_within(5), pytest.raises(TrustError, match=words):
            opened(world)


def with_link(world: World) -> None:
    store = world.folder.parent / "store"
    world.file.rename(store)
    world.file.symlink_to(store)


def url_safe(world: World) -> None:
    def respell(document: dict[str, Any]) -> None:
        one = document["signatures"][0]
        one["sig"] = one["sig"].replace("+", "-").replace("/", "_")
        document["payload"] = document["payload"].replace("+", "-").replace("/", "_")

    edit_envelope(world, respell)


ACCEPTED: dict[str, Callable[[World], object]] = {
    "as it is": lambda w: None,
    "two of three": lambda w: (w.sign(0, 2), trust_with(0, 1, 2, threshold=2)(w)),
    "a foreign signature beside": lambda w: w.sign(0, 5),
    "a wrong signature beside": lambda w: edit_envelope(
        w, lambda e: e["signatures"].insert(0, {"keyid": IDS[1], "sig": b64(bytes(64))})
    ),
    "a nameless signature beside": lambda w: edit_envelope(
        w, lambda e: e["signatures"].append({"sig": "AA=="})
    ),
    "this very release": trust_with(min_release="0.1"),
    "this very release, in fewer numbers": lambda w: (
        edit(w, lambda s: definition(s)["externalParameters"].update(release="1")),
        trust_with(min_release="1.0.0.0")(w),
    ),
    "an older release is allowed": trust_with(min_release="0.0.9.9"),
    "other keys and manifests are revoked": trust_with(0, revoked=[IDS[1], "0" * 64]),
    "a revoked key beside enough others": lambda w: (
        w.sign(0, 1, 2),
        trust_with(0, 1, 2, threshold=2, revoked=[IDS[1]])(w),
    ),
    "the URL-safe base64": url_safe,
    "unknown keys of the envelope": lambda w: edit_envelope(w, lambda e: e.update(later=1)),
    "a link to the envelope": with_link,
    "a policy in a file": lambda w: policy_file(json.dumps(policy(0)))(w),
    "a pinned manifest": lambda w: (
        w.file.unlink(),
        trust(w.statement["subject"][0]["digest"]["sha256"])(w),
    ),
    "a release of more numbers": lambda w: edit(
        w, lambda s: definition(s)["externalParameters"].update(release="12.0.3.4")
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_a_policy_accepts(world, name):
    ACCEPTED[name](world)
    (finding,) = opened(world).trusted
    assert ("release" in finding) != ("pins" in finding)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.quick(3)
def test_without_a_policy_all_is_as_before(world, name):
    """Whatever the envelope holds; a changed artifact is still an ArtifactError."""
    REFUSED[name][0](world)
    world.trust = None
    if name == "an altered cubin":
        with pytest.raises(ArtifactError, match="altered or truncated"):
            opened(world)
    else:
        assert opened(world).trusted == ()


class TestTheEnvironment:
    def test_its_policy_counts_for_every_set(self, world, monkeypatch):
        world.trust = None
        monkeypatch.setenv(TRUST_VARIABLE, "0" * 64)
        with pytest.raises(TrustError, match=f"{TRUST_VARIABLE} allows 0000"):
            opened(world)

    def test_both_policies_have_to_be_satisfied(self, world, monkeypatch):
        monkeypatch.setenv(TRUST_VARIABLE, "0" * 64)
        with pytest.raises(TrustError, match=TRUST_VARIABLE):
            opened(world)
        monkeypatch.setenv(TRUST_VARIABLE, world.statement["subject"][0]["digest"]["sha256"])
        assert len(opened(world).trusted) == 2
        world.trust = policy(1)
        with pytest.raises(TrustError, match="refused by trust: "):
            opened(world)

    def test_set_and_empty_is_an_error(self, world, monkeypatch):
        world.trust = None
        monkeypatch.setenv(TRUST_VARIABLE, "")
        with pytest.raises(TrustError, match="got an empty string"):
            opened(world)

    def test_the_default_set_is_opened_anew_if_it_changes(self, world, monkeypatch):
        monkeypatch.setattr(folder_module, "find_artifacts", lambda: world.folder)
        folder_module._default_artifacts.cache_clear()
        first = open_artifacts()
        assert open_artifacts() is first
        monkeypatch.setenv(TRUST_VARIABLE, "0" * 64)
        with pytest.raises(TrustError):
            open_artifacts()
        monkeypatch.delenv(TRUST_VARIABLE)
        assert open_artifacts() == first
        folder_module._default_artifacts.cache_clear()

    def test_the_default_set_under_a_policy_of_the_caller(self, world, monkeypatch):
        monkeypatch.setattr(folder_module, "find_artifacts", lambda: world.folder)
        assert len(open_artifacts(trust=policy(0)).trusted) == 1
        with pytest.raises(TrustError):
            open_artifacts(trust=policy(1))


@pytest.mark.parametrize("value", [1, True, b"policy.json", ["a"], {"keys": {1, 2}}])
def test_what_is_no_policy_at_all_is_a_type_error(world, value):
    with pytest.raises(TypeError, match="trust: expected a"):
        open_artifacts(world.folder, trust=value)


def test_the_manifest_that_was_checked_is_the_one_that_is_used(world, monkeypatch):
    """The signed bytes are on disk again by the time that they are asked for once more."""
    path = world.folder / "manifest.json"
    good = path.read_bytes()
    rewritten_manifest(world)
    evil = path.read_bytes()
    path.write_bytes(good)
    parsed = folder_module.parse_manifest(evil)
    monkeypatch.setattr(folder_module, "_read_manifest", lambda folder: (evil, parsed))
    with pytest.raises(TrustError, match=r"manifest\.json: sha256 is"):
        opened(world)


def test_a_build_that_is_published_meanwhile_is_read_again(world, manifest, monkeypatch):
    """The envelope of the new set is not held against the manifest of the old one."""
    path = world.folder / "manifest.json"
    old = path.read_text()
    rewritten_manifest(world)
    new = path.read_text()
    path.write_text(old)
    check, published = folder_module._check_closed, []

    def publish(artifacts: Any) -> None:
        check(artifacts)
        if not published:
            published.append(True)
            path.write_text(new)
            named = subjects(folder_module.parse_manifest(new), new.encode())
            edit(world, lambda s: s["subject"][0]["digest"].update(sha256=named["manifest.json"]))

    monkeypatch.setattr(folder_module, "_check_closed", publish)
    assert opened(world).manifest.toolchain["nvrtc"] == "13.1"


def test_nothing_is_parsed_before_its_signature_is_known(world, monkeypatch):
    from dsv4_router_runtime.artifacts import trust as trust_module

    parsed = []
    monkeypatch.setattr(trust_module, "parse_statement", lambda *a, **b: parsed.append(a))
    world.sign(1)
    with pytest.raises(TrustError):
        opened(world)
    assert not parsed


def test_a_refusal_survives_pickle(world):
    world.trust = policy(1)
    with pytest.raises(TrustError) as caught:
        opened(world)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (TrustError, str(caught.value))


def test_hashing_and_verifying_a_whole_set_takes_at_most_10_ms():
    """The checkout's set, whose manifest is parsed anyway."""
    opened = open_artifacts(find_artifacts())
    text = (opened.folder / "manifest.json").read_bytes()
    cubins = [(opened.folder / kernel.file).read_bytes() for kernel in opened.manifest.kernels]
    statement = json.dumps(sets.statement(opened.manifest)).encode()
    envelope = json.dumps(signed(statement)).encode()
    folder = Path(os.devnull)

    def hash_and_verify() -> None:
        policy_read = read_policy(policy(0), source="trust")
        for kernel, cubin in zip(opened.manifest.kernels, cubins, strict=True):
            folder_module.check_cubin(kernel, cubin, file=kernel.file)
        named = subjects(opened.manifest, text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{read_policy.__module__}.read_file", lambda *a, **b: envelope)
            policy_read.check(folder, named["manifest.json"], named)

    assert best_ms(hash_and_verify, 10) <= 10
