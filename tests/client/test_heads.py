"""Personal heads: each client trains one, keeps it, and is measured with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rankfit.client.workspace import ClientStore
from rankfit.configs.compose import compose
from rankfit.server.run_directory import WEIGHTS
from rankfit.tasks.base_model import ModelError, load_base, shared_heads, whole_modules
from rankfit.tasks.lora import inject
from tests.server.federation import run, settings_for
from tests.server.test_loop import lines

PERSONAL = (
    "head.mode=local",
    "server.evaluate=clients",
    "partition.kind=pathological",
    "partition.classes-per-client=5",
    "partition.test=alike",
    "train.steps=2",
    "simulation.clients=2",
    "server.clients-per-round=2",
    "server.min-clients=2",
    "run.rounds=2",
    "server.diagnostics=false",
)


def heads(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every kept head, by client and file."""
    return {
        f"{file.parent.name}/{file.name}": load_file(file)
        for file in sorted((folder / "heads").glob("*/*.safetensors"))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds."""
    return run(settings_for(tmp_path_factory.mktemp("personal"), "whole", *PERSONAL))


def test_every_client_keeps_its_own_head_and_shares_the_adapter(whole: Path) -> None:
    found = heads(whole)
    assert sorted(found) == [
        f"partition-{client}/round-{number:05d}.safetensors"
        for client in range(2)
        for number in (1, 2)
    ]
    last = [found[f"partition-{client}/round-00002.safetensors"] for client in range(2)]
    assert all(set(one) == {"classifier.weight", "classifier.bias"} for one in last)
    assert not torch.equal(last[0]["classifier.weight"], last[1]["classifier.weight"])
    saved = load_file(whole / "checkpoint" / WEIGHTS)
    assert saved and not any("classifier" in name for name in saved)


def test_a_resumed_run_goes_on_from_the_heads_of_its_checkpoint(
    whole: Path, tmp_path: Path
) -> None:
    run(settings_for(tmp_path, "cut", *PERSONAL, "run.rounds=1"))
    # As if a second round had been under way when the run was stopped.
    store = ClientStore(tmp_path / "cut" / "heads" / "partition-0")
    store.save(2, {name: tensor + 1 for name, tensor in store.load(2).items()})
    cut = run(settings_for(tmp_path, "cut", *PERSONAL, "run.resume=true"))
    assert heads(whole).keys() == heads(cut).keys()
    for name, head in heads(whole).items():
        for key, tensor in head.items():
            assert torch.equal(tensor, heads(cut)[name][key]), (name, key)
    assert lines(whole)[-1]["evaluation"] == lines(cut)[-1]["evaluation"]


def test_a_store_gives_the_newest_head_below_a_round(tmp_path: Path) -> None:
    store = ClientStore(tmp_path / "one")
    assert store.load(9) is None
    for number in (1, 2, 4, 7):
        store.save(number, {"w": torch.full((2,), float(number))})
    assert store.load(8)["w"][0] == 7 and store.load(7)["w"][0] == 4 and store.load(2) is None
    store.save(3, {"w": torch.zeros(2)})
    assert sorted(file.name for file in store.folder.iterdir()) == [
        "round-00002.safetensors",
        "round-00003.safetensors",
    ]


def test_a_new_run_of_the_same_name_does_not_go_on_from_an_older_ones_heads(tmp_path: Path) -> None:
    """On a node of its own nothing refuses the second run: its folder is the server's to check."""
    older, newer = (ClientStore(tmp_path / "one", run) for run in ("a", "b"))
    for number in (1, 3):
        older.save(number, {"w": torch.full((2,), float(number))})
    assert newer.load(9) is None and older.load(9)["w"][0] == 3
    assert ClientStore(tmp_path / "one").load(9)["w"][0] == 3, "who does not say sees any"
    newer.save(2, {"w": torch.zeros(2)})
    assert [file.name for file in newer.folder.iterdir()] == ["round-00002.safetensors"]
    assert older.load(9) is None


def test_two_runs_that_share_a_nodes_folder_keep_apart(tmp_path: Path) -> None:
    """A client that waits for its first round is measured without the head of the run before."""
    some = (*PERSONAL, "simulation.clients=4", "server.clients-per-round=1", "server.min-clients=4")
    shared = f"head.directory={tmp_path / 'node'}"
    run(settings_for(tmp_path, "one", *some, shared, "server.clients-per-round=4"))
    second = run(settings_for(tmp_path, "two", *some, shared))
    alone = run(settings_for(tmp_path, "alone", *some))
    for with_older, without in zip(lines(second), lines(alone), strict=True):
        assert with_older.get("evaluation") == without.get("evaluation")


def test_clients_never_share_a_store(tmp_path: Path) -> None:
    settings = compose([f"run.directory={tmp_path}", "run.name=r", *PERSONAL[:2]])
    stores = [
        ClientStore.of(settings, "heads", 0, None),
        ClientStore.of(settings, "heads", 1, None),
        ClientStore.of(settings, "heads", None, "/data/one"),
        ClientStore.of(settings, "heads", None, "/data/two"),
        ClientStore.of(settings, "heads", None, None),
    ]
    assert len({store.folder for store in stores}) == 5
    assert all(store.folder.parent == tmp_path / "r" / "heads" for store in stores)
    own = compose([f"head.directory={tmp_path / 'mine'}", *PERSONAL[:2]])
    assert ClientStore.of(own, "heads", 2, None).folder == tmp_path / "mine" / "partition-2"


def test_other_modules_than_the_classifier_may_be_trained_whole() -> None:
    named = compose(["head.modules=vit.layernorm, classifier"])
    base = load_base(named, 10)
    assert shared_heads(base, named.head) == ("vit.layernorm", "classifier")
    peft = inject(base, {"vit.layers.0.attention.q_proj": 1}, scale=1.0, dropout=0.0,
                  heads=shared_heads(base, named.head))  # fmt: skip
    assert sum("modules_to_save" in n for n, p in peft.named_parameters() if p.requires_grad) == 4
    with pytest.raises(ModelError, match="'nonsense' is no module of ViT"):
        shared_heads(base, compose(["head.modules=nonsense"]).head)
    local = compose(PERSONAL[:2]).head
    assert shared_heads(base, local) == () and whole_modules(base, local) == ("classifier",)
