"""The model card of a saved composition, and uploading one. The hub is replaced at huggingface_hub's own API."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard
from saved import logits, rebuilt

from calm_fast.hf import ComposedForCausalLM
from calm_fast.hf.model_card import MARK

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_card_says_what_the_composition_is_made_of(folder: Path) -> None:
    text = (folder / "composed" / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.tags == ["calm-fast", "composition"]
    assert card.data.base_model is None and card.data.license is None  # folders are no models on the hub
    parameters = sum(p.numel() for p in rebuilt(folder).connections.parameters())
    assert "| anchor | `../anchor` | newest | llama | the text |" in text
    assert "| augmenter 0 | `../augmenter` | newest | gpt2 | the anchor's tokens |" in text
    assert f"{parameters:,} parameters in float32" in text and "- augmenter 0: -1 -> -1, 2 -> 1" in text
    assert "import calm_fast" in text and "AutoModelForCausalLM.from_pretrained" in text and str(folder) not in text


def test_parts_on_the_hub_are_base_models(folder: Path) -> None:
    model = rebuilt(folder)
    model.config.anchor_path, model.config.anchor_revision = "owner/anchor", COMMIT
    model.config.augmenter_paths = ["augmenter"]
    model.save_pretrained(folder / "again", check_parts=False)
    text = (folder / "again" / "README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.base_model == ["owner/anchor", "augmenter"]
    assert f"| anchor | `owner/anchor` | {COMMIT} |" in text


def test_a_card_of_one_s_own_stays(folder: Path) -> None:
    file = folder / "composed" / "README.md"
    ours = file.read_text(encoding="utf-8")
    file.write_text(f"an old one\n{MARK}\n", encoding="utf-8")
    rebuilt(folder).save_pretrained(folder / "composed")
    assert file.read_text(encoding="utf-8") == ours
    for mine in (ours.replace(MARK, "") + "\nMy words.\n", "My card.\n"):
        file.write_text(mine, encoding="utf-8")
        rebuilt(folder).save_pretrained(folder / "composed")
        assert file.read_text(encoding="utf-8") == mine
    file.write_bytes(b"\xff\xfe no UTF-8")
    rebuilt(folder).save_pretrained(folder / "composed")
    assert file.read_bytes() == b"\xff\xfe no UTF-8"


class Hub:
    """What the API of the hub would be asked, and the card that it has."""

    def __init__(self, card: Path | None) -> None:
        self.card, self.calls, self.files = card, list[tuple[str, Any]](), dict[str, bytes]()

    def create_repo(self, api: Any, repo_id: str, **kwargs: Any) -> Any:
        self.calls.append(("create_repo", kwargs))
        return SimpleNamespace(repo_id=f"owner/{repo_id}")

    def create_branch(self, api: Any, repo_id: str, **kwargs: Any) -> None:
        self.calls.append(("create_branch", kwargs["branch"]))

    def file_exists(self, api: Any, repo_id: str, filename: str, **kwargs: Any) -> bool:
        return self.card is not None

    def hf_hub_download(self, api: Any, repo_id: str, filename: str, **kwargs: Any) -> str:
        return str(self.card)

    def upload_folder(self, api: Any, **kwargs: Any) -> str:
        root = Path(kwargs.pop("folder_path"))
        self.files = {f.relative_to(root).as_posix(): f.read_bytes() for f in root.rglob("*") if f.is_file()}
        self.calls.append(("upload_folder", kwargs))
        return "the commit"


def hub_of(card: Path | None, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(card)
    for name in ("create_repo", "create_branch", "file_exists", "hf_hub_download", "upload_folder"):
        call = getattr(hub, name)
        monkeypatch.setattr(HfApi, name, lambda api, *args, _call=call, **kwargs: _call(api, *args, **kwargs))
    return hub


def on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ComposedForCausalLM:
    model: ComposedForCausalLM = rebuilt(folder)
    model.config.anchor_path, model.config.augmenter_paths = "owner/anchor", ["owner/augmenter"]
    monkeypatch.setattr(type(model), "_check_parts", lambda self: None)  # nothing of these is in a cache here
    return model


def test_an_upload_has_the_files_of_a_save(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_of(None, monkeypatch)
    model = on_the_hub(folder, monkeypatch)
    found: Any = model.push_to_hub(
        "mine", private=True, revision="dev", commit_message="first", tags=["x", "calm-fast"]
    )
    assert found == "the commit"
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    asked = dict(hub.calls)
    assert asked["create_repo"] == {"private": True, "exist_ok": True} and asked["create_branch"] == "dev"
    expected = {"repo_id": "owner/mine", "revision": "dev", "create_pr": False, "commit_message": "first"}
    assert asked["upload_folder"] == expected | {"commit_description": None}
    assert set(hub.files) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.tags == ["calm-fast", "composition", "x"] and MARK in card.text
    assert card.data.base_model == ["owner/anchor", "owner/augmenter"]
    for name, content in hub.files.items():
        (tmp_path / "down").mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    parts = {"anchor": folder / "anchor", "augmenters": folder / "augmenter"}
    loaded = ComposedForCausalLM.from_pretrained(tmp_path / "down", **parts)
    assert logits(loaded).equal(logits(rebuilt(folder)))


def test_a_card_that_somebody_wrote_on_the_hub_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.md").write_text("---\nlicense: mit\n---\nMine.\n", encoding="utf-8")
    hub = hub_of(tmp_path / "theirs.md", monkeypatch)
    on_the_hub(folder, monkeypatch).push_to_hub("mine")
    assert hub.files["README.md"].decode() == "---\nlicense: mit\n---\nMine.\n"
    (tmp_path / "theirs.md").write_text(f"old {MARK}", encoding="utf-8")
    on_the_hub(folder, monkeypatch).push_to_hub("mine")
    assert "owner/anchor" in hub.files["README.md"].decode()


def test_an_upload_passes_the_size_of_shards_on_and_refuses_what_it_does_not_know(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = hub_of(None, monkeypatch)
    with pytest.raises(ValueError, match="`max_shard_size` must be at least the size of the composition tensors"):
        on_the_hub(folder, monkeypatch).push_to_hub("mine", max_shard_size=10)
    with pytest.raises(TypeError, match="colour"):
        on_the_hub(folder, monkeypatch).push_to_hub("mine", colour="red")
    assert not hub.calls
