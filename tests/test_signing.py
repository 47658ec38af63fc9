"""keygen, sign and verify-signature: what they write and refuse, and what a build does to it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs the builder")
pytest.importorskip("click", reason="needs the builder")
pytest.importorskip("cryptography", reason="needs the extra `sign`")

from builds import TOPK, topk_set
from click.testing import CliRunner, Result
from signed_sets import KEYS, policy
from test_publish import compiled_to_other, other_plan

from build_kernels.building import build, plan
from build_kernels.cli import main as cli
from build_kernels.release import keys, provenance, sign
from build_kernels.release.provenance import locked_hashes
from dsv4_router_runtime.artifacts import dsse, statement
from dsv4_router_runtime.artifacts.folder import open_artifacts
from dsv4_router_runtime.artifacts.trust import TRUST_VARIABLE

ROOT = Path(__file__).parents[1]
ENVELOPE = "manifest.dsse.json"


def call(*arguments: object, **more: str) -> Result:
    environment = {TRUST_VARIABLE: None, keys.PASSPHRASE_VARIABLE: None, **more}
    return CliRunner().invoke(cli.main, [str(each) for each in arguments], env=environment)


def refused(*arguments: object, **more: str) -> str:
    result = call(*arguments, **more)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return " ".join(result.stderr.split())


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of router_topk alone, built and committed."""
    root = tmp_path / "checkout"
    topk_set(root / "artifacts")
    (root / "build_kernels").mkdir()
    for name in ("pyproject.toml", "build_kernels/pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "Build")
    monkeypatch.setattr(plan, "KERNELS", (TOPK,))
    monkeypatch.setattr(sign, "default_artifacts", lambda: root / "artifacts")
    return root


@pytest.fixture
def key(tmp_path: Path) -> Path:
    assert call("keygen", tmp_path / "key.pem").exit_code == 0
    return tmp_path / "key.pem"


def envelope(root: Path) -> dsse.Envelope:
    return dsse.parse_envelope((root / "artifacts" / ENVELOPE).read_bytes(), source="e")


class TestKeygen:
    def test_the_policy_that_it_prints_accepts_what_the_key_signs(self, checkout, tmp_path):
        made = call("keygen", tmp_path / "k")
        (tmp_path / "policy.json").write_text(made.stdout)
        assert call("sign", "--key", tmp_path / "k").exit_code == 0
        place = checkout / "artifacts"
        result = call("verify-signature", place, "--trust", tmp_path / "policy.json")
        assert result.exit_code == 0, result.stderr
        assert "release 0.1.0, signed by " in result.stdout
        other = call("keygen", tmp_path / "other").stdout
        (tmp_path / "policy.json").write_text(other)
        assert "no key of the policy" in refused(
            "verify-signature", place, "--trust", tmp_path / "policy.json"
        )

    def test_only_its_owner_may_read_the_key(self, tmp_path):
        before = os.umask(0)
        try:
            result = call("keygen", tmp_path / "k")
        finally:
            os.umask(before)
        assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
        secret = (tmp_path / "k").read_text().splitlines()[1]
        assert secret not in result.output

    @pytest.mark.parametrize("kind", ["a file", "a link to nowhere"])
    def test_nothing_is_overwritten(self, tmp_path, kind):
        path = tmp_path / "k"
        if kind == "a file":
            path.write_text("precious")
        else:
            path.symlink_to(tmp_path / "elsewhere")
        assert "exists, and no key is overwritten" in refused("keygen", path)
        assert not (tmp_path / "elsewhere").exists()
        assert kind != "a file" or path.read_text() == "precious"

    def test_a_folder_that_is_not_there(self, tmp_path):
        assert "no key can be written there" in refused("keygen", tmp_path / "no" / "k")

    def test_a_write_that_breaks_off_leaves_no_half_key(self, tmp_path, monkeypatch):
        def full(descriptor: int, mode: str) -> None:
            os.close(descriptor)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(keys.os, "fdopen", full)
        assert "No space left" in refused("keygen", tmp_path / "k")
        assert not (tmp_path / "k").exists()

    def test_a_passphrase(self, checkout, tmp_path):
        path = tmp_path / "k"
        given = {keys.PASSPHRASE_VARIABLE: "correct horse"}
        assert call("keygen", path, **given).exit_code == 0
        assert "ENCRYPTED" in path.read_text()
        assert "nobody can be asked" in refused("sign", "--key", path)
        wrong = {keys.PASSPHRASE_VARIABLE: "other"}
        assert "not with this passphrase" in refused("sign", "--key", path, **wrong)
        assert call("sign", "--key", path, **given).exit_code == 0

    @pytest.mark.parametrize("options", [["--encrypt"], []])
    def test_an_empty_passphrase_is_refused(self, tmp_path, options):
        empty = {keys.PASSPHRASE_VARIABLE: ""}
        assert "the passphrase is empty" in refused("keygen", tmp_path / "k", *options, **empty)
        assert not (tmp_path / "k").exists()

    def test_nobody_to_ask_for_the_passphrase(self, tmp_path):
        assert "nobody can be asked" in refused("keygen", tmp_path / "k", "--encrypt")


class TestSign:
    def test_the_statement(self, checkout, key):
        result = call("sign", "--key", key, "--builder-id", "https://ci.example/1")
        assert result.exit_code == 0, result.stderr
        found = envelope(checkout)
        assert found.payload_type == "application/vnd.in-toto+json"
        document = json.loads(found.payload)
        names = [each["name"] for each in document["subject"]]
        built = open_artifacts(checkout / "artifacts").manifest.kernels
        assert names == sorted(["manifest.json", *(kernel.file for kernel in built)])
        assert document["predicateType"] == "https://slsa.dev/provenance/v1"
        predicate = document["predicate"]
        assert predicate["runDetails"] == {"builder": {"id": "https://ci.example/1"}}
        definition = predicate["buildDefinition"]
        assert definition["buildType"] == statement.BUILD_TYPE
        assert definition["externalParameters"]["release"] == "0.1.0"
        source, *wheels = definition["resolvedDependencies"]
        assert source["digest"] == {"gitCommit": git(checkout, "rev-parse", "HEAD")}
        uris = {each["uri"] for each in wheels}
        assert "pkg:pypi/nvidia-cutlass-dsl@4.8.1" in uris
        assert "pkg:pypi/nvidia-cuda-nvrtc-cu12@12.9.86" in uris
        assert len(uris) == len(wheels)

    def test_the_same_commit_is_the_same_statement(self, checkout, key, tmp_path):
        call("sign", "--key", key)
        first = envelope(checkout).payload
        (checkout / "artifacts" / ENVELOPE).unlink()
        twin = tmp_path / "twin"
        shutil.copytree(checkout, twin)
        assert provenance.make_statement(twin, open_artifacts(twin / "artifacts")) == first

    def test_a_second_key_adds_a_signature_and_the_same_key_none(self, checkout, key, tmp_path):
        call("keygen", tmp_path / "second")
        call("sign", "--key", key)
        call("sign", "--key", tmp_path / "second")
        before = envelope(checkout)
        assert len(before.signatures) == 2
        assert call("sign", "--key", key).exit_code == 0
        assert envelope(checkout) == before

    def test_a_signature_more_than_any_reader_takes(self, checkout, key):
        call("sign", "--key", key)
        path = checkout / "artifacts" / ENVELOPE
        document = json.loads(path.read_text())
        more = [{"keyid": str(number), "sig": ""} for number in range(16)]
        path.write_text(json.dumps(document | {"signatures": more}))
        assert "has 16 signatures; no more are read" in refused("sign", "--key", key)

    def test_another_statement_is_not_replaced(self, checkout, key):
        call("sign", "--key", key)
        before = envelope(checkout)
        git(checkout, "commit", "--quiet", "--allow-empty", "--message", "Next")
        assert "signed for another commit" in refused("sign", "--key", key)
        assert envelope(checkout) == before

    @pytest.mark.parametrize("new", ["pyproject.toml", "stray.py"])
    def test_a_tree_that_is_not_its_commits(self, checkout, key, new):
        with (checkout / new).open("a") as file:
            file.write("# edited\n")
        message = refused("sign", "--key", key)
        assert "is not as in commit" in message
        assert new in message

    def test_new_files_that_the_users_settings_hide(self, checkout, key):
        git(checkout, "config", "status.showUntrackedFiles", "no")
        (checkout / "stray.py").touch()
        assert "?? stray.py" in refused("sign", "--key", key)

    def test_an_edit_that_git_was_told_not_to_see(self, checkout, key):
        """The release is the commit's, and so is the manifest."""
        for name in ("pyproject.toml", "artifacts/manifest.json"):
            git(checkout, "update-index", "--assume-unchanged", name)
        path = checkout / "pyproject.toml"
        path.write_text(path.read_text().replace('version = "0.1.0"', 'version = "9.9"'))
        assert call("sign", "--key", key).exit_code == 0
        predicate = json.loads(envelope(checkout).payload)["predicate"]
        assert predicate["buildDefinition"]["externalParameters"]["release"] == "0.1.0"
        manifest = checkout / "artifacts" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"wait_limit_ms": ', '"wait_limit_ms": 1'))
        assert "is not the manifest of commit" in refused("sign", "--key", key)

    def test_a_manifest_of_other_bytes_with_the_same_contents(self, checkout, key, tmp_path):
        """No verifier would accept what was signed for it."""
        copy = shutil.copytree(checkout / "artifacts", tmp_path / "copy")
        text = (copy / "manifest.json").read_text()
        (copy / "manifest.json").write_text(json.dumps(json.loads(text)))
        message = refused("sign", "--key", key, "--artifacts", copy)
        assert "is not the manifest of commit" in message
        assert not (copy / ENVELOPE).exists()

    @pytest.mark.parametrize("builder_id", ["", "ci", "https://a b", "https://a\n"])
    def test_a_builder_that_is_no_uri(self, checkout, key, builder_id):
        message = refused("sign", "--key", key, "--builder-id", builder_id)
        assert "--builder-id: expected a URI" in message

    def test_without_a_commit(self, checkout, key):
        shutil.rmtree(checkout / ".git")
        message = refused("sign", "--key", key)
        assert "no commit to sign for" in message or "no git checkout of its own" in message
        git(checkout.parent, "init", "--quiet")
        assert "no git checkout of its own" in refused("sign", "--key", key)

    def test_without_git(self, checkout, key):
        assert "no git is installed" in refused("sign", "--key", key, PATH="")

    def test_another_set_than_the_commits(self, checkout, key, tmp_path):
        part = topk_set(tmp_path / "part", ["sm_90a"])
        message = refused("sign", "--key", key, "--artifacts", part)
        assert "is not the manifest of commit" in message
        assert not (part / ENVELOPE).exists()

    def test_sources_that_are_newer_than_the_set(self, checkout, key, monkeypatch):
        monkeypatch.setattr(plan, "source_digest", lambda *given: "0" * 64)
        assert "older than their sources" in refused("sign", "--key", key)

    def test_an_altered_cubin(self, checkout, key):
        path = checkout / "artifacts" / f"{TOPK.name}.sm_90a.cubin"
        path.write_bytes(path.read_bytes() + b"!")
        assert "altered or truncated" in refused("sign", "--key", key)
        assert not (checkout / "artifacts" / ENVELOPE).exists()

    def test_a_version_that_no_policy_could_compare(self, checkout, key):
        path = checkout / "pyproject.toml"
        path.write_text(path.read_text().replace('version = "0.1.0"', 'version = "0.1.0rc1"'))
        git(checkout, "commit", "--quiet", "--all", "--message", "Candidate")
        assert "a release of 1 to 4 numbers" in refused("sign", "--key", key)

    def test_a_key_that_others_may_read(self, checkout, key):
        key.chmod(0o640)
        assert f"run `chmod 600 {key}`" in refused("sign", "--key", key).replace("` ", "`")

    @pytest.mark.parametrize("kind", ["nothing", "text", "a folder", "a FIFO", "RSA", "public"])
    def test_a_file_that_is_no_key(self, checkout, tmp_path, kind):
        path = tmp_path / "k"
        words = "no private key in PEM"
        if kind == "nothing":
            words = "No such file"
        elif kind == "text":
            path.write_text("secret words")
        elif kind == "a folder":
            path.mkdir()
            words = "a directory"
        elif kind == "a FIFO":
            os.mkfifo(path)
            words = "a FIFO"
        else:
            path.write_bytes(_other_key(kind))
            words = "expected an Ed25519 key" if kind == "RSA" else words
        if path.is_file():
            path.chmod(0o600)
        message = refused("sign", "--key", path)
        assert words in message
        assert "secret words" not in message

    def test_an_envelope_that_is_none(self, checkout, key):
        (checkout / "artifacts" / ENVELOPE).write_text("{}")
        assert f"{ENVELOPE}: payload: missing" in refused("sign", "--key", key).replace("- ", "-")

    def test_cryptography_is_missing(self, checkout, key, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
        assert "pip install 'dsv4-router-builder[sign]'" in refused("sign", "--key", key)


def _other_key(kind: str) -> bytes:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import rsa

    if kind == "public":
        public = KEYS[0].public_key()
        return public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    plain = form.NoEncryption()
    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, plain)


@pytest.fixture
def wheel(checkout: Path, key: Path, tmp_path: Path) -> Path:
    """A wheel's part that counts, with signatures."""
    assert call("sign", "--key", key).exit_code == 0
    path = tmp_path / "dsv4_router-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dsv4_router_runtime/_artifacts/", "")
        archive.writestr("dsv4_router_runtime/router.py", "")
        for file in sorted((checkout / "artifacts").iterdir()):
            if file.suffix != ".ptx":
                archive.write(file, f"dsv4_router_runtime/_artifacts/{file.name}")
    return path


class TestVerifySignature:
    @pytest.fixture
    def trust(self, key: Path, tmp_path: Path) -> Path:
        public = keys.load_key(key).public_key().public_bytes_raw()
        path = tmp_path / "policy.json"
        path.write_text(json.dumps({"keys": [base64.b64encode(public).decode()]}))
        return path

    def test_a_wheel(self, wheel, trust):
        result = call("verify-signature", wheel, "--trust", trust)
        assert result.exit_code == 0, result.stderr
        assert "every hash of 3 kernels is right" in result.stdout

    def test_the_policy_may_come_from_the_environment(self, wheel, trust):
        assert call("verify-signature", wheel, **{TRUST_VARIABLE: str(trust)}).exit_code == 0
        assert call("verify-signature", wheel).exit_code == 2

    @pytest.mark.parametrize("what", ["cubin", "manifest", "envelope", "key"])
    def test_a_wheel_that_somebody_rewrote(self, wheel, trust, tmp_path, what):
        with zipfile.ZipFile(wheel) as archive:
            files = {item.filename: archive.read(item) for item in archive.infolist()}
        place = "dsv4_router_runtime/_artifacts/"
        cubin = f"{place}{TOPK.name}.sm_90a.cubin"
        manifest = f"{place}manifest.json"
        words = "manifest.json: sha256 is"
        if what == "envelope":
            del files[f"{place}{ENVELOPE}"]
            words = "nobody signed these artifacts"
        elif what == "key":
            trust.write_text(json.dumps(policy(0)))
            words = "no key of the policy"
        elif what == "manifest":
            files[manifest] = files[manifest].replace(b'"wait_limit_ms": ', b'"wait_limit_ms": 1')
        else:
            files[cubin] += b"evil"
            words = "altered or truncated"
        again = tmp_path / "again.whl"
        with zipfile.ZipFile(again, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        message = refused("verify-signature", again, "--trust", trust)
        assert words in message
        assert message.startswith(f"error: {again}: "), "not a folder that is gone by now"

    @pytest.mark.parametrize("what", ["text", "another wheel", "twice", "a path", "cut", "bomb"])
    def test_a_file_that_is_no_wheel_of_ours(self, wheel, trust, tmp_path, monkeypatch, what):
        path = tmp_path / "bad.whl"
        shutil.copy(wheel, path)
        words = "cannot be read as a wheel"
        place = "dsv4_router_runtime/_artifacts/"
        if what == "text":
            path.write_text("no zip")
        elif what == "cut":
            path.write_bytes(path.read_bytes()[:-40])
        elif what == "bomb":
            size = path.stat().st_size
            monkeypatch.setattr("build_kernels.building.router_wheel._MAX_BYTES", size)
            words = f"more than {size} bytes of artifacts"
        elif what == "another wheel":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("other/__init__.py", "")
            words = "no manifest.json in it"
        else:
            name = "manifest.json" if what == "twice" else "below/more.json"
            with zipfile.ZipFile(path, "a") as archive, pytest.MonkeyPatch.context() as patch:
                patch.setattr("warnings.warn", lambda *a, **b: None)
                archive.writestr(place + name, "{}")
            words = "is no single file of the set"
        assert words in refused("verify-signature", path, "--trust", trust)

    @pytest.mark.parametrize(
        "name",
        [
            "dsv4_router_runtime/./_artifacts/manifest.json",
            "dsv4_router_runtime//_artifacts/manifest.json",
            "dsv4_router_runtime/x/../_artifacts/manifest.json",
            "../dsv4_router_runtime/_artifacts/manifest.json",
            "/dsv4_router_runtime/_artifacts/manifest.json",
            "dsv4_router-0.1.0.data/purelib/dsv4_router_runtime/_artifacts/manifest.json",
            "dsv4_router-0.1.0.data/data/evil",
        ],
    )
    def test_a_member_that_an_installer_writes_over_a_signed_file(self, wheel, trust, name):
        """pip writes all but two of these over the manifest that was signed."""
        with zipfile.ZipFile(wheel, "a") as archive:
            archive.writestr(name, "{}")
        message = refused("verify-signature", wheel, "--trust", trust)
        assert f"{wheel}: '{name}' may be installed as another file" in message


class TestABuild:
    def test_keeps_signatures_of_the_manifest_that_it_finds(
        self, checkout, key, monkeypatch, compile_once
    ):
        call("sign", "--key", key)
        place = checkout / "artifacts"
        before = (place / ENVELOPE).read_bytes()
        with monkeypatch.context() as patch:
            # Nothing is out of date, so nothing is written.
            patch.setattr(build, "_publish", None)
            assert call("build", "--kernel", TOPK.name, "--artifacts", place).exit_code == 0
        (place / f"{TOPK.name}.sm_90a.cubin").unlink()
        assert call("build", "--kernel", TOPK.name, "--artifacts", place).exit_code == 0
        assert (place / ENVELOPE).read_bytes() == before
        open_artifacts(place)

    @pytest.mark.parametrize("exchanged", [True, False])
    def test_removes_signatures_of_another_manifest(
        self, checkout, key, monkeypatch, tmp_path, exchanged
    ):
        call("sign", "--key", key)
        place = checkout / "artifacts"
        if not exchanged:
            (place / ".notes").write_text("a name with a dot keeps the folder")
        monkeypatch.setattr(build, "_compile_all", lambda *_: compiled_to_other(tmp_path))
        report = build.run_build(place, other_plan(place), jobs=1)
        assert report.removed == (ENVELOPE,)
        assert not (place / ENVELOPE).exists()
        open_artifacts(place)


def test_the_hashes_of_a_lock_file():
    text = (
        "# made by a tool\n--index-url x\n"
        f"A.b_c==1.2 \\\n    --hash=sha256:{'1' * 64} \\\n    --hash=sha256:{'0' * 64}\n"
        f"other[extra]==3 ; python_version > '3' --hash=sha256:{'2' * 64}\n    # via a\nnone==1\n"
    )
    assert locked_hashes(text) == {
        ("a-b-c", "1.2"): ["0" * 64, "1" * 64],
        ("other", "3"): ["2" * 64],
        ("none", "1"): [],
    }


def test_wheels_of_the_lock_file_are_in_the_statement(checkout):
    lock = checkout / provenance.LOCK_FILE
    lock.write_text(
        f"pyelftools==0.33 --hash=sha256:{'1' * 64}\n"
        f"nvidia-cutlass-dsl==4.8.1 --hash=sha256:{'2' * 64} --hash=sha256:{'3' * 64}\n"
        f"nvidia-cuda-nvdisasm==1.0 --hash=sha256:{'4' * 64}\n"
    )
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message", "Lock")
    made = json.loads(provenance.make_statement(checkout, open_artifacts(checkout / "artifacts")))
    listed = made["predicate"]["buildDefinition"]["resolvedDependencies"]
    wheels = {each["name"]: each for each in listed}
    assert wheels["pyelftools"]["digest"] == {"sha256": "1" * 64}
    assert wheels["nvidia-cutlass-dsl"]["annotations"] == {"locked_sha256": ["2" * 64, "3" * 64]}
    assert "digest" not in wheels["nvidia-cutlass-dsl"]
    assert wheels["nvidia-cuda-nvdisasm"].keys() == {"name", "uri"}
