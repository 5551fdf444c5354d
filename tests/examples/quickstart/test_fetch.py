"""Downloads that are refused say why; packages and the models' and corpora's formats are read rightly."""

import gzip
import hashlib
import io
import shutil
import struct
import subprocess
import tarfile

import numpy as np
import pytest
import torch

from examples.quickstart import amazon_queen, asterisk, fetch, whisper_ct2


def source(data: bytes = b"", **changes) -> fetch.Source:
    values = dict(
        client="apt",
        name="a-package",
        version="1",
        file="a-package_1_all.deb",
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        what="",
        licence="",
        origin="",
    )
    return fetch.Source(**{**values, **changes})


def test_a_file_that_the_user_put_there_is_used_and_checked_once(tmp_path, monkeypatch):
    (tmp_path / "a-package_1_all.deb").write_bytes(b"content")
    assert fetch.download(source(b"content"), tmp_path).read_bytes() == b"content"
    monkeypatch.setattr(fetch, "sha256", lambda path: pytest.fail("read again"))
    fetch.download(source(b"content"), tmp_path)


def test_a_wrong_file_is_moved_away_and_named(tmp_path):
    (tmp_path / "a-package_1_all.deb").write_bytes(b"tampered")
    with pytest.raises(fetch.FetchError, match="a-package_1_all.deb has sha256 .* was tried"):
        fetch.download(source(b"content"), tmp_path)
    assert not (tmp_path / "a-package_1_all.deb").exists()


def test_without_apt_get_the_message_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(fetch.FetchError, match="no apt-get here.*yourself"):
        fetch.download(source(b"content"), tmp_path)


def test_a_client_that_refuses_is_quoted(tmp_path):
    refused = source(client="pip", name="no-such-package-of-this-project", file="x.whl")
    # pip is asked for a local folder only: no registry is reached
    command = [*refused.command(), "--no-index"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "No matching distribution" in fetch.last_words(done.stdout + done.stderr)


def test_debian_packages_are_unpacked(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        info = tarfile.TarInfo("./usr/share/doc/words.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"words"))
    members = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", inner.getvalue())]
    package = b"!<arch>\n"
    for name, data in members:
        package += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
            + data
            + b"\n" * (len(data) % 2)
        )
    path = tmp_path / "p.deb"
    path.write_bytes(package)
    fetch.unpack_deb(path, tmp_path / "out")
    assert (tmp_path / "out/usr/share/doc/words.txt").read_text() == "words"
    path.write_bytes(b"!<arch>\n")
    with pytest.raises(fetch.FetchError, match="holds no data.tar"):
        fetch.unpack_deb(path, tmp_path / "out")


def test_an_interrupted_conversion_leaves_nothing_that_looks_finished(tmp_path):
    target = tmp_path / "model"

    def interrupted(out):
        (out / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.make_folder(target, "key", interrupted)
    assert not target.exists()
    assert fetch.make_folder(target, "key", lambda out: (out / "weights").write_text("whole"))
    assert not fetch.make_folder(target, "key", interrupted)  # up to date: not built again
    assert fetch.make_folder(target, "another key", lambda out: (out / "weights").write_text("new"))
    assert (target / "weights").read_text() == "new"


def test_every_source_is_pinned():
    assert len({s.file for s in fetch.SOURCES}) == len(fetch.SOURCES)
    for s in fetch.SOURCES:
        assert len(s.sha256) == 64 and s.size > 0 and s.version and s.licence and s.origin
        assert s.name in fetch.sources_table()


def write_ct2(variables: dict[str, np.ndarray], aliases: dict[str, str]) -> bytes:
    """CTranslate2's file, version 6, as its C++ writer lays it out."""

    def string(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    codes = {np.dtype("float32"): 0, np.dtype("float16"): 4}
    out = (
        struct.pack("<I", 6)
        + string("WhisperSpec")
        + struct.pack("<I", 3)
        + struct.pack("<I", len(variables))
    )
    for name, value in variables.items():
        out += string(name) + struct.pack("<B", value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        out += struct.pack("<BI", codes[value.dtype], value.nbytes) + value.tobytes()
    return out + struct.pack("<I", len(aliases)) + b"".join(string(a) + string(t) for a, t in aliases.items())


def test_whisper_comes_back_from_ctranslate2():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        vocab_size=51865,
        num_mel_bins=80,
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    v = {"decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"]}

    def copy(target, source, weight="weight", bias="bias"):
        v[f"{target}/{weight}"], v[f"{target}/{bias}"] = state[f"{source}.weight"], state[f"{source}.bias"]

    def stack(target, source, names):
        v[f"{target}/weight"] = np.concatenate([state[f"{source}.{n}_proj.weight"] for n in names])
        v[f"{target}/bias"] = np.concatenate(
            [state.get(f"{source}.{n}_proj.bias", np.zeros(64, np.float32)) for n in names]
        )

    copy("encoder/conv1", "model.encoder.conv1"), copy("encoder/conv2", "model.encoder.conv2")
    for side in ("encoder", "decoder"):
        v[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        copy(f"{side}/layer_norm", f"model.{side}.layer_norm", "gamma", "beta")
        layer, to = f"model.{side}.layers.0", f"{side}/layer_0"
        stack(f"{to}/self_attention/linear_0", f"{layer}.self_attn", "qkv")
        copy(f"{to}/self_attention/linear_1", f"{layer}.self_attn.out_proj")
        copy(f"{to}/self_attention/layer_norm", f"{layer}.self_attn_layer_norm", "gamma", "beta")
        copy(f"{to}/ffn/linear_0", f"{layer}.fc1"), copy(f"{to}/ffn/linear_1", f"{layer}.fc2")
        copy(f"{to}/ffn/layer_norm", f"{layer}.final_layer_norm", "gamma", "beta")
    cross = "model.decoder.layers.0.encoder_attn"
    copy("decoder/layer_0/attention/linear_0", f"{cross}.q_proj")
    stack("decoder/layer_0/attention/linear_1", cross, "kv")
    copy("decoder/layer_0/attention/linear_2", f"{cross}.out_proj")
    copy(
        "decoder/layer_0/attention/layer_norm",
        "model.decoder.layers.0.encoder_attn_layer_norm",
        "gamma",
        "beta",
    )

    data = write_ct2(v, {"decoder/projection/weight": "decoder/embeddings/weight"})
    variables = whisper_ct2.read_variables(data)
    assert np.array_equal(variables["decoder/projection/weight"], variables["decoder/embeddings/weight"])
    converted = whisper_ct2.state_dict_of(variables)
    assert converted.keys() == state.keys()
    for name, value in state.items():
        assert np.array_equal(converted[name].numpy(), value), name
    with pytest.raises(ValueError, match="is a part missing"):
        whisper_ct2.read_variables(data[: len(data) // 2])


def test_prompts_leave_out_sounds(tmp_path):
    lines = (
        "; comment\nbeep: [a beep]\nhello: Hello there.\nlast: and so on...\nsilence/1: nothing\n"
        "intro: use your touch tone keypad\n"
    )
    path = tmp_path / "core-sounds-en.txt.gz"
    path.write_bytes(gzip.compress(lines.encode()))
    assert asterisk.words_of(path) == {"hello": "Hello there.", "last": "and so on"}
    path.write_bytes(gzip.compress("adios: adiós, señor".encode("latin-1")))
    assert asterisk.words_of(path) == {"adios": "adiós, señor"}


def test_dialogue_lines_are_cut_into_segments():
    assert amazon_queen.segments("Hello.*AOGo away*XY120, 45Now!") == ["Hello.", "Go away", "Now!"]


def test_dialogue_tables_name_their_clips():
    def table(lines):
        out = b""
        for number, text in lines:
            out += struct.pack(">hhB", 0, number, len(text)) + text.encode()
            out += b"\0" * (-(len(talk_header) + 96 + len(out)) % 4 if text else 0)
        return out

    joe, other = [(10, "Hi there.*AOBye.")], [(255, "Who?")]
    talk_header = b"\0" * 32
    first = table(joe)
    others_at = 32 + 96 + len(first)
    talk_header = struct.pack(">5h", -1, 0, 7, len(joe), len(other)).ljust(22, b"\0") + struct.pack(
        ">H", others_at
    )
    talk_header = talk_header.ljust(32, b"\0")
    talk = talk_header + b"\0" * 96 + first
    talk += table(other)
    assert list(amazon_queen.dialogue_lines(talk)) == [
        ("07000AJ1.SB", "Hi there."),
        ("07000AJ2.SB", "Bye."),
        ("0700FFP1.SB", "Who?"),
    ]


def test_another_file_is_refused(tmp_path):
    (tmp_path / "queen.1c").write_bytes(b"something else")
    with pytest.raises(ValueError, match="QTBL"):
        amazon_queen.Resources(tmp_path / "queen.1c")


def test_dry_run_needs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fetch", "--dry-run", "--cache", str(tmp_path / "none")])
    assert fetch.main() == 0
    shown = capsys.readouterr().out
    assert "hf download" in shown and "0 are in" in shown
    assert not (tmp_path / "none").exists()
