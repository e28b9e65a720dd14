"""The joined space: what each of its parts is, that a cell's place depends on nothing but the cell, and its file."""

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.embedding.cells import KEY, embed
from perturbgene.errors import InputError
from perturbgene.inference.run import Run, load_run
from perturbgene.training.cell_space import EMBEDDING_FILE, JoinedSpace, asked_of, pooled_states
from perturbgene.training.votes import direct_path, expression_of
from tests.untrained import HIDDEN, a_run, save, some_cells


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return some_cells(200)


def with_votes(run: Run) -> Run:
    """Give genes drawn votes, as training would solve them."""
    path = direct_path(run.model)
    assert path is not None
    path.votes_tk.copy_(torch.randn(path.votes_tk.shape, generator=torch.Generator().manual_seed(0)))
    return run


def training_cells(run: Run, cells: ad.AnnData) -> IterableAnnDataset:
    return IterableAnnDataset(cells, run.tokenizer, batch_size=7)


@pytest.fixture(scope="module")
def saved(cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An mlm run with a space, as it is read from its folder."""
    run, folder = with_votes(a_run()), tmp_path_factory.mktemp("run")
    space = JoinedSpace.fit(run.model, training_cells(run, cells), has_states=True)
    assert space is not None
    save(run, folder)
    space.save(folder)
    return load_run(folder, device="cpu")


def test_the_parts_are_components_votes_and_states_each_of_its_own_variance(saved: Run, cells: ad.AnnData) -> None:
    found_nc = embed(cells, saved).obsm[KEY]
    is_full_n = np.isfinite(found_nc[:, 0])
    assert is_full_n.tolist() == [row != 2 for row in range(200)]  # that cell is empty
    points_nc = found_nc[is_full_n]
    genes, labels = 8, 3 + 2  # 9 genes have 8 components; cell types and tissues
    parts = np.split(points_nc, [genes, genes + labels], axis=1)
    assert [part.shape[1] for part in parts] == [genes, labels, HIDDEN]
    variances = [part.var(axis=0).sum() for part in parts]
    np.testing.assert_allclose(variances, [1, 0.5**2, 0.125**2], rtol=0.03)  # the empty cell is in the first two
    np.testing.assert_allclose(points_nc.mean(axis=0), 0, atol=0.02)

    [block] = IterableAnnDataset(cells, saved.tokenizer, batch_size=200).blocks()
    expression_nt = expression_of(block, saved.model.config).toarray()
    deviation_t = expression_nt.std(axis=0)
    divided_nt = expression_nt / np.sqrt(np.maximum(deviation_t, 0.01 * deviation_t.max()))
    expected_nc = PCA(8).fit_transform(divided_nt)[is_full_n]
    ratio_c = np.abs(expected_nc).mean(axis=0) / np.abs(parts[0]).mean(axis=0)
    np.testing.assert_allclose(ratio_c, ratio_c[0], rtol=1e-3)  # the same components but for their sign and scale
    states_nh = pooled_states(saved.model, saved.tokenizer, block, pooling="asked")[is_full_n]
    np.testing.assert_allclose(np.corrcoef(states_nh[:, 0], parts[2][:, 0])[0, 1], 1, atol=1e-5)


def test_a_cell_has_the_same_place_in_any_company(saved: Run, cells: ad.AnnData) -> None:
    found_nc = embed(cells, saved).obsm[KEY]
    np.testing.assert_allclose(embed(cells[[5]], saved).obsm[KEY][0], found_nc[5], atol=1e-5)
    assert found_nc.dtype == np.float32


def test_a_gene_that_a_file_does_not_measure_moves_no_cell_off_the_mean(saved: Run, cells: ad.AnnData) -> None:
    fewer = cells[:, :7].copy()
    center_c = np.nanmean(embed(fewer, saved).obsm[KEY][:, :8], axis=0)
    np.testing.assert_allclose(center_c, 0, atol=0.05)
    zeroed = cells.copy()
    zeroed.X = zeroed.X.toarray() * (np.arange(9) < 7)
    assert np.abs(np.nanmean(embed(zeroed, saved).obsm[KEY][:, :8], axis=0)).max() > 0.3  # zeros that were measured do


def test_given_phenotypes_are_not_asked(saved: Run, cells: ad.AnnData) -> None:
    free, one, all_given = (
        embed(cells, saved, given=given).obsm[KEY]
        for given in ({}, {"tissue": "blood"}, {"tissue": "blood", "cell_type": "B cell"})
    )
    assert free.shape == one.shape == all_given.shape
    np.testing.assert_array_equal(free[:, :13], one[:, :13])  # labels do not leak into the votes
    assert not np.allclose(free[3, 13:], one[3, 13:])
    np.testing.assert_array_equal(all_given[3, 13:], 0)
    assert asked_of(saved.tokenizer, ["tissue"]) == ["cell_type"]


def test_other_runs_have_a_space_too(cells: ad.AnnData) -> None:
    classifier = with_votes(a_run("cls"))
    space = JoinedSpace.fit(classifier.model, training_cells(classifier, cells), has_states=True)
    assert space is not None and space.axes_gc.shape[1] == 8 + 3
    voter = with_votes(a_run())
    alone = JoinedSpace.fit(voter.model, training_cells(voter, cells), has_states=False)  # as of --train_only votes
    [block] = IterableAnnDataset(cells[:6], voter.tokenizer, batch_size=6).blocks()
    assert alone is not None and alone.place(voter.model, voter.tokenizer, block).shape == (6, 13)
    without = a_run(included_phenotypes=[])
    bare = JoinedSpace.fit(without.model, training_cells(without, cells), has_states=True)
    assert bare is not None and bare.axes_gc.shape[1] == 8 and bare.scale > 0
    assert JoinedSpace.fit(voter.model, training_cells(voter, cells[:1]), has_states=True) is None


def test_many_labels_take_few_coordinates(cells: ad.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perturbgene.training.cell_space.MOST_LOGITS", 2)
    run = with_votes(a_run())
    space = JoinedSpace.fit(run.model, training_cells(run, cells), has_states=False)
    assert space is not None and space.axes_gc.shape[1] == 8 + 2 + 2  # three cell types, two tissues


def test_a_run_without_a_space_says_so(
    cells: ad.AnnData, saved: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = load_run(save(a_run(), tmp_path / "old"), device="cpu")
    found = embed(cells, old)
    assert found.uns["perturbgene"]["pooling"] == "asked" and found.obsm[KEY].shape[1] == HIDDEN
    with pytest.raises(InputError, match=r"old has no embedding.safetensors that fits: .* change --pooling"):
        embed(cells, old, pooling="joined")
    for content in (b"", b"not a tensor file", Path(saved.path, EMBEDDING_FILE).read_bytes()[:-9]):
        (tmp_path / "old" / EMBEDDING_FILE).write_bytes(content)
        caplog.clear()
        assert replace(old).space is None and f"{EMBEDDING_FILE} is damaged" in caplog.text
    assert embed(cells, saved).uns["perturbgene"]["pooling"] == "joined"
