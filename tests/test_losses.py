"""The criteria: any of them goes with any system, learns the epoch, and may have parameters."""

import pytest
import torch
from torch import nn

import checkpoint as ckpt
import options
import systems
import train
from losses import CRITERIA, ContrastiveLoss, InfoNCELoss, make_criterion
from system import System
from tests import reference
from tests.conftest import read_log, train_args


def scores(n=6):
    return torch.randn(n, n, generator=torch.Generator().manual_seed(0))


def test_the_warm_up_counts_all_negatives_and_then_the_hardest():
    x, criterion = scores(), ContrastiveLoss(0.2, max_violation=True, warmup_epochs=2)
    for epoch, hardest in ((0, False), (1, False), (2, True), (7, True)):
        criterion.epoch = epoch
        torch.testing.assert_close(criterion(x), reference.hinge(x, 0.2, hardest))
    # Outside of a training run nobody sets the epoch: then there is no warm-up.
    torch.testing.assert_close(
        ContrastiveLoss(0.2, True, 5)(x), reference.hinge(x, 0.2, max_violation=True)
    )


@pytest.mark.parametrize("name", systems.SYSTEMS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_any_criterion_goes_with_any_system(name, criterion):
    flags = f"--model {name} --criterion {criterion} --temperature 0.5 --margin 0.3".split()
    opt = options.parse(flags)
    made = systems.of(opt).criterion(opt)
    assert type(made).__name__ == criterion and made.margin == 0.3
    if criterion == "InfoNCELoss":
        assert made.temperature == 0.5
    else:
        assert made.max_violation == (name in ("chan", "vse"))


def test_names_are_made_by_their_name():
    assert isinstance(make_criterion("InfoNCELoss", 0.1, False, 0, 0.5), InfoNCELoss)
    assert isinstance(make_criterion("ContrastiveLoss", 0.1, True, 3, 0.5), ContrastiveLoss)
    with pytest.raises(SystemExit):
        options.parse(["--criterion", "Other"])


class Tempered(nn.Module):
    """InfoNCE that learns its temperature."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.epochs = []

    def forward(self, scores, image_index=None):
        self.epochs.append(self.epoch)
        return InfoNCELoss(1.0)(scores * self.log_scale.exp(), image_index)


class TemperedSystem(System):
    def criterion(self, opt):
        self.made = Tempered()
        return self.made


def test_parameters_of_a_criterion_are_trained_saved_and_resumed(tiny, monkeypatch):
    system = TemperedSystem()
    monkeypatch.setitem(systems.SYSTEMS, "scan", system)
    train.main(train_args(num_epochs=4, model_name="whole", logger_name="whole"))
    assert sorted(set(system.made.epochs)) == [0, 1, 2, 3]
    train.main(train_args(num_epochs=2))
    saved = ckpt.load("run/checkpoint_1.pth.tar")["run"]
    assert saved["criterion"]["log_scale"] != 0
    counts = [len(group["params"]) for group in saved["optimizer"]["param_groups"]]
    model = ckpt.load_model("run/checkpoint_1.pth.tar")[0]
    assert sum(counts) == len(list(model.parameters())) + 1
    train.main(train_args(num_epochs=4, resume="run/checkpoint_1.pth.tar"))
    want, got = (ckpt.load(f"{d}/checkpoint_3.pth.tar")["run"] for d in ("whole", "run"))
    assert torch.equal(want["criterion"]["log_scale"], got["criterion"]["log_scale"])
    assert want["criterion"]["log_scale"] != saved["criterion"]["log_scale"]
    assert [x["Le"] for x in read_log("whole")] == [x["Le"] for x in read_log("run")]
    # A checkpoint with another criterion does not fit, and says so.
    monkeypatch.setitem(systems.SYSTEMS, "scan", System())
    with pytest.raises(ValueError, match="its run state does not fit .*--reset_start_epoch takes"):
        train.main(train_args(num_epochs=5, resume="run/checkpoint_3.pth.tar"))
