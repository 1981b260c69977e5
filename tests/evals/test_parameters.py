import torch
from torch import nn

from nano_think.evals.parameters import count_parameters


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleDict({"transformer": nn.Linear(4, 4), "diffuser": nn.Linear(4, 5)})
        self.gains = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight


def totals(module):
    return {component.name: component.total for component in count_parameters(module).components}


def test_components_by_hand_with_a_tied_head():
    report = count_parameters(Whole())
    assert totals(Whole()) == {
        "(own)": 3,
        "embedding": 44,
        "router": 15,
        "experts.transformer": 20,
        "experts.diffuser": 25,
        "head": 0,
    }
    assert report.total == sum(p.numel() for p in Whole().parameters())


def test_views_of_one_storage_count_once_and_slices_apart():
    module = nn.Module()
    table = torch.zeros(6, 4)
    module.table, module.turned = nn.Embedding(6, 4, _weight=table), nn.Linear(6, 4, bias=False)
    module.turned.weight = nn.Parameter(table.T)
    assert totals(module) == {"table": 24, "turned": 0}
    module.table.weight, module.turned.weight = nn.Parameter(table[:2]), nn.Parameter(table[2:])
    assert totals(module) == {"table": 8, "turned": 16}


def test_trainable_and_the_meta_device():
    with torch.device("meta"):
        module = Whole()
    module.experts.requires_grad_(False)
    report = count_parameters(module)
    assert (report.total, report.trainable) == (107, 62)


def test_table_has_the_plan_beside_the_counts():
    table = count_parameters(Whole()).table()
    rows = {row[0]: row for row in table.cells()}
    assert rows["experts.transformer"] == ["experts.transformer", "20", "20", "~7M"]
    assert rows["total"] == ["total", "107", "107", "~30M"]
    assert rows["head"][3] == ""
