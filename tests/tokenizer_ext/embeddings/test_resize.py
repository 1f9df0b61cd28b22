import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.vocabulary_map import NewPiece, VocabularyMap
from cpt_merge.core.artifact import StageRecord, write_record
from cpt_merge.core.errors import UserError
from cpt_merge.data.sources import Corpus, Source
from cpt_merge.tokenizer_ext import EmbeddingsConfig
from cpt_merge.tokenizer_ext.embeddings.methods import INITIALISERS
from cpt_merge.tokenizer_ext.embeddings.methods.auto import letterless_tokens
from cpt_merge.tokenizer_ext.embeddings.methods.method import NewRows
from cpt_merge.tokenizer_ext.embeddings.old_rows import OldRows
from cpt_merge.tokenizer_ext.embeddings.resize import resize_embeddings
from cpt_merge.tokenizer_ext.embeddings.token_space import TokenSpace, sparsemax, train_space
from cpt_merge.tracking.events import Summary
from tests.merge.conftest import BASE_ROWS, CPT_ROWS, NEW, make_family, save_weights
from tests.merge.test_merge_files import load

MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


SENTENCES = [
    "the ing and in the ing",
    "and ed in the de",
    "an ing ed the de and",
    "in an ing ed the",
]
UNSEEN = ("ly", "all")  # the new pieces that are not in them


def resize(family, out, tracker, **config):
    text = family.root / "text.txt"
    text.write_text("\n".join(SENTENCES * 10))
    corpus = Corpus(sources=[Source(path=str(text), language="en")])
    return resize_embeddings(
        EmbeddingsConfig(**config), family.base, family.tokenizer, out, corpus, tracker
    )


def pieces(family):
    return [piece.id for piece in family.vocabulary.new]


@pytest.mark.parametrize("method", list(INITIALISERS))
def test_old_rows_are_the_base_s_bit_for_bit(family, tmp_path, tracker, method):
    """Invariant 1."""
    resize(family, tmp_path / "out", tracker, input=method, head=method)
    weights = load(tmp_path / "out")
    assert set(weights) == set(family.weights["base"])
    for name, values in family.weights["base"].items():
        assert torch.equal(
            weights[name][: len(values)].view(torch.int16), values.view(torch.int16)
        ), name
        assert len(weights[name]) == (CPT_ROWS if name in MATRICES else len(values))
        assert torch.isfinite(weights[name]).all()


def test_constituents_have_the_direction_of_their_mean_and_the_norm_of_the_old_rows(
    untied, tmp_path, tracker
):
    resize(untied, tmp_path / "out", tracker, input="constituents", head="constituents")
    for name in MATRICES:
        base, weights = untied.weights["base"][name].float(), load(tmp_path / "out")[name].float()
        norm = base.norm(dim=1).mean()
        for piece in untied.vocabulary.new:
            expected = base[piece.constituents].mean(0)
            assert torch.cosine_similarity(weights[piece.id], expected, dim=0) > 0.999
            assert weights[piece.id].norm() == pytest.approx(float(norm), rel=0.02)


def test_ends_lean_on_the_last_constituent_in_the_input_and_on_the_first_in_the_head(
    untied, tmp_path, tracker
):
    resize(untied, tmp_path / "out", tracker, input="ends", head="ends")
    for name, end, share in ((MATRICES[0], -1, 0.5), (MATRICES[1], 0, 0.25)):
        base, weights = untied.weights["base"][name].float(), load(tmp_path / "out")[name].float()
        for piece in untied.vocabulary.new:
            expected = (1 - share) * base[piece.constituents].mean(0) + share * base[
                piece.constituents[end]
            ]
            assert torch.allclose(weights[piece.id], expected, rtol=2**-8, atol=1e-6), piece


def test_auto_is_ends_for_pieces_with_letters_and_constituents_for_pieces_of_bytes(
    untied, tmp_path, tracker
):
    """The constituents of `all` become bytes; those of the other pieces keep their letters."""
    path = untied.tokenizer / "tokenizer.json"
    content, vocabulary = json.loads(path.read_text()), untied.vocabulary
    of_bytes = next(piece for piece in vocabulary.new if piece.piece == "all")
    for letter, byte in zip(("a", "l"), ("<0xE4>", "<0xB8>"), strict=True):
        content["model"]["vocab"][byte] = content["model"]["vocab"].pop(letter)
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    made = {}
    for method in ("auto", "ends", "constituents"):
        resize(untied, tmp_path / method, tracker, input=method, head=method)
        made[method] = load(tmp_path / method)
    for name in MATRICES:
        for piece in vocabulary.new:
            like = "constituents" if piece == of_bytes else "ends"
            expected, found = made[like][name][piece.id], made["auto"][name][piece.id]
            assert torch.allclose(found.float(), expected.float(), rtol=0.05, atol=0.01), piece
        assert not torch.equal(made["ends"][name][of_bytes.id], made["auto"][name][of_bytes.id])


@pytest.mark.parametrize(
    ("token", "byte_level", "letterless"),
    [
        ("<0xE4>", False, True),
        ("▁", False, True),
        ("。", False, True),
        ("中", False, False),
        ("▁the", False, False),
        ("ä¸", True, True),  # two bytes of a character
        ("Ġ", True, True),
        ("ä¸Ń", True, False),  # 中
        ("ä¸Ńå", True, False),  # a character and the beginning of the next
    ],
)
def test_which_tokens_hold_no_whole_letter(token, byte_level, letterless, tmp_path):
    pre_tokenizer = {"type": "ByteLevel"} if byte_level else None
    content = {"model": {"vocab": {token: 7}}, "pre_tokenizer": pre_tokenizer}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert letterless_tokens(tmp_path, [7]) == ({7} if letterless else set())


def test_ends_of_a_tied_matrix_lean_on_neither(tmp_path, tracker):
    family = make_family(tmp_path / "models", tied=True)
    resize(family, tmp_path / "out", tracker, input="ends")
    base, weights = (
        family.weights["base"][MATRICES[0]].float(),
        load(tmp_path / "out")[MATRICES[0]].float(),
    )
    for piece in family.vocabulary.new:
        if piece.piece != "de":  # it has the constituents of `ed`, and so some noise
            expected = base[piece.constituents].mean(0)
            assert torch.allclose(weights[piece.id], expected, rtol=2**-8, atol=1e-6), piece


def test_focus_is_halfway_between_constituents_and_what_the_text_has_in_like_places(
    untied, tmp_path, tracker
):
    resize(untied, tmp_path / "out", tracker, input="focus", head="focus")
    corpus = Corpus(sources=[Source(path=str(untied.root / "text.txt"), language="en")])
    space = train_space(corpus, untied.tokenizer, CPT_ROWS, 10**6, seed=0)
    known = np.flatnonzero(space.known).tolist()
    made_of = {piece.id: piece.constituents for piece in untied.vocabulary.new}
    for name in MATRICES:
        base, weights = untied.weights["base"][name].float(), load(tmp_path / "out")[name].float()
        for piece in untied.vocabulary.new:
            expected = base[piece.constituents].mean(0)
            others = [token for token in known if token != piece.id]
            if piece.piece not in UNSEEN:
                rows = torch.stack([base[made_of.get(token, [token])].mean(0) for token in others])
                shares = sparsemax(space.vectors[[piece.id]] @ space.vectors[others].T)[0]
                assert 0 < (shares > 0).sum() < len(others)
                expected = (expected + torch.from_numpy(shares) @ rows) / 2
            assert torch.allclose(weights[piece.id], expected, rtol=0.02, atol=0.01), piece


def test_focus_says_how_many_pieces_the_text_does_not_show(untied, tmp_path, tracker, capsys):
    resize(untied, tmp_path / "out", tracker, input="focus")
    assert f"{len(UNSEEN)} of {len(NEW)} new pieces occur less than" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_text_is_read_for_focus_only(untied, tmp_path, tracker):
    nowhere = Corpus(sources=[Source(path="./missing.txt", language="en")])
    models = (untied.base, untied.tokenizer)
    resize_embeddings(
        EmbeddingsConfig(input="ends", head="mean"), *models, tmp_path / "ends", nowhere
    )
    with pytest.raises(UserError, match=r"missing\.txt does not exist"):
        resize_embeddings(EmbeddingsConfig(head="focus"), *models, tmp_path / "focus", nowhere)
    assert not (tmp_path / "focus").exists()


def test_focus_without_enough_text_is_the_mean_of_the_constituents(untied, tmp_path, tracker):
    (tmp_path / "short.txt").write_text("the ing")
    corpus = Corpus(sources=[Source(path=str(tmp_path / "short.txt"), language="en")])
    config = EmbeddingsConfig(input="focus")
    resize_embeddings(config, untied.base, untied.tokenizer, tmp_path / "out", corpus)
    base, weights = (
        untied.weights["base"][MATRICES[0]].float(),
        load(tmp_path / "out")[MATRICES[0]].float(),
    )
    for piece in untied.vocabulary.new[:3]:
        assert torch.allclose(
            weights[piece.id], base[piece.constituents].mean(0), rtol=2**-8, atol=1e-6
        )


def test_the_text_is_an_input_of_the_stage_for_focus_only(untied, tmp_path):
    """A change of the text makes the stage run again where it matters, and only there."""
    from cpt_merge.launcher.recipe import load_recipe
    from cpt_merge.launcher.run import Run
    from cpt_merge.launcher.stage import prepare
    from cpt_merge.launcher.stages import EMBEDDINGS

    recipe = tmp_path / "recipe.yaml"
    text = {"ko": tmp_path / "ko.txt", "en": tmp_path / "en.txt"}
    for path in text.values():
        path.write_text("a")
    sources = [{"path": str(path), "language": language} for language, path in text.items()]
    values = {"name": "x", "runs": str(tmp_path), "models": {"base": str(untied.base), "chat": str(untied.chat)},
              "corpus": {"sources": sources}, "tokenizer": {"new_pieces": {"ko": 1}}, "training": {"tokens": 1}}  # fmt: skip
    recipe.write_text(json.dumps(values))
    write_record(tmp_path / "x" / "tokenizer", StageRecord("tokenizer", "key", {}, {}), 0)

    def keys():
        overrides = [[], ["embeddings.head=focus"]]
        return [prepare(Run(load_recipe(recipe, more)), EMBEDDINGS).key for more in overrides]

    before = keys()
    text["ko"].write_text("another")
    plain, focus = keys()
    assert plain == before[0]
    assert focus != before[1]


@pytest.mark.parametrize("method", ["auto", "constituents", "ends", "focus"])
def test_rows_that_would_be_equal_come_apart(family, tmp_path, tracker, method):
    assert sorted(NEW["ed"]) == sorted(NEW["de"])
    resize(family, tmp_path / "out", tracker, input=method)
    rows = load(tmp_path / "out")["model.embed_tokens.weight"][pieces(family)]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


@pytest.mark.parametrize("use", ["input", "head", "both"])
@pytest.mark.parametrize("method", ["auto", "constituents", "ends", "focus"])
def test_rows_of_equal_means_come_apart(tmp_path, method, use):
    """僅僅 had the row of 僅, and so had pieces of different bytes that nobody trained."""
    torch.manual_seed(0)
    base = torch.randn(40, 16).bfloat16()
    base[20:24] = base[20]
    save_file({"model.embed_tokens.weight": base}, tmp_path / "model.safetensors")
    made_of = [[1, 2, 3], [1, 2, 3, 1, 2, 3], [1, 2, 3] * 3, [3, 1, 2], [5], [5, 5], [5, 5, 5]]
    made_of += [[20, 6], [21, 6], [22, 6, 23, 6], [20, 21], [22], [2, 1, 1], [1, 2, 2]]
    task = NewRows(
        [NewPiece(40 + number, "", ids) for number, ids in enumerate(made_of)],
        OldRows(Checkpoint.open(tmp_path), "model.embed_tokens.weight"),
        np.random.default_rng(0),
        use,
        TokenSpace(np.zeros((40 + len(made_of), 3), np.float32)),
    )
    new = torch.from_numpy(np.concatenate(list(INITIALISERS[method](task))))
    rows = torch.cat([base[:21].float(), base[24:].float(), new]).bfloat16().float()
    distances = torch.cdist(rows, rows) + 9 * torch.eye(len(rows))
    assert distances.min() > 0.005 * base.float().norm(dim=1).mean()


def test_chat_tokens_and_padding_start_from_the_mean(untied, tmp_path, tracker):
    resize(untied, tmp_path / "out", tracker)
    weights = load(tmp_path / "out")
    for name in MATRICES:
        mean = untied.weights["base"][name].double().mean(0).float().bfloat16()
        for row in [43, *untied.vocabulary.padding]:
            assert torch.equal(weights[name][row], mean)


@pytest.mark.parametrize(("input", "head"), [("gaussian", "random"), ("focus", "gaussian")])
def test_the_same_seed_gives_the_same_bytes(untied, tmp_path, tracker, input, head):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        resize(untied, tmp_path / out, tracker, input=input, head=head, seed=seed)
    a, b, c = ((tmp_path / out / "model.safetensors").read_bytes() for out in "abc")
    assert a == b != c


def test_input_and_head_have_their_own_methods(untied, tmp_path, tracker):
    resize(untied, tmp_path / "out", tracker, input="mean", head="random")
    weights = load(tmp_path / "out")
    assert len({tuple(row.tolist()) for row in weights[MATRICES[0]][pieces(untied)]}) == 1
    assert len({tuple(row.tolist()) for row in weights[MATRICES[1]][pieces(untied)]}) == len(NEW)


def test_the_moments_of_what_is_drawn(tmp_path):
    torch.manual_seed(0)
    mix = torch.randn(4, 4)
    save_weights({"x": torch.randn(500, 4) @ mix + torch.tensor([1.0, 2, 3, 4])}, tmp_path)
    old = OldRows(Checkpoint.open(tmp_path), "x")
    rows = load(tmp_path)["x"].numpy().astype("f8")
    many = [NewPiece(number, "", [0]) for number in range(20_000)]
    drawn = np.concatenate(
        list(INITIALISERS["gaussian"](NewRows(many, old, np.random.default_rng(0))))
    )
    np.testing.assert_allclose(old.mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(drawn.mean(0), rows.mean(0), atol=0.1)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(rows.T), atol=0.4)
    drawn = np.concatenate(
        list(INITIALISERS["random"](NewRows(many, old, np.random.default_rng(0))))
    )
    np.testing.assert_allclose(drawn.mean(0), 0, atol=0.1)
    assert np.sqrt((drawn**2).sum(1).mean()) == pytest.approx(old.mean_norm, rel=0.02)


def test_only_files_that_hold_the_matrices_are_written(tmp_path, tracker):
    family = make_family(tmp_path / "models", files=8)
    resize(family, tmp_path / "out", tracker)
    inodes = {path.name: path.stat().st_ino for path in family.base.glob("*.safetensors")}
    new = {
        path.name
        for path in (tmp_path / "out").glob("*.safetensors")
        if path.stat().st_ino != inodes[path.name]
    }
    weight_map = json.loads((family.base / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    assert new == {weight_map[name] for name in MATRICES}
    assert (
        json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
        == weight_map
    )
    assert Checkpoint.open(tmp_path / "out").info("lm_head.weight").shape == (CPT_ROWS, 32)


def test_links_of_the_hub_s_cache_are_followed(tmp_path, tracker):
    family = make_family(tmp_path / "models", files=3)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(family.base.glob("*.safetensors")):
        os.replace(file, blobs / file.name)
        file.symlink_to(blobs / file.name)
    resize(family, tmp_path / "out", tracker)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_tied_head_that_is_stored_is_left_out(tmp_path, tracker):
    family = make_family(tmp_path / "models", tied=True)
    stored = {
        **family.weights["base"],
        "lm_head.weight": family.weights["base"]["model.embed_tokens.weight"].clone(),
    }
    save_weights(stored, family.base)
    resize(family, tmp_path / "out", tracker)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_the_result_loads_and_goes_on(untied, tmp_path, tracker, recording):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    results = resize(untied, tmp_path / "out", tracker)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("the ing all", return_tensors="pt")[
        "input_ids"
    ]
    assert torch.isfinite(model(ids).logits).all()
    assert model.config.vocab_size == CPT_ROWS == results["rows"]
    assert VocabularyMap.load(tmp_path / "out") == untied.vocabulary
    summary = Summary({f"embeddings/{name}": value for name, value in results.items()})
    assert summary in recording.events
    assert {row["matrix"] for row in recording.tables["embeddings/norms"]} == {"embed", "head"}


@pytest.mark.parametrize(
    "name", ["final_logits_bias", "cls.predictions.bias", "generator_lm_head.bias"]
)
def test_another_table_by_token_is_named(untied, tmp_path, tracker, name):
    save_weights({**untied.weights["base"], name: torch.zeros(BASE_ROWS)}, untied.base)
    with pytest.raises(UserError, match=f"^{name} of .* cannot be extended"):
        resize(untied, tmp_path / "out", tracker)


def test_an_embedding_that_is_not_finite_is_refused(untied, tmp_path, tracker):
    weights = {name: values.clone() for name, values in untied.weights["base"].items()}
    weights["model.embed_tokens.weight"][3, 0] = torch.inf
    save_weights(weights, untied.base)
    with pytest.raises(UserError, match=r"embed_tokens.weight of .* contains NaN or Inf"):
        resize(untied, tmp_path / "out", tracker)
    assert not (tmp_path / "out").exists()


def test_a_map_for_another_base_is_refused(untied, tmp_path, tracker):
    VocabularyMap(BASE_ROWS - 1, BASE_ROWS - 1, [], [], []).save(untied.tokenizer)
    with pytest.raises(UserError, match=r"has 38 rows, .* 37"):
        resize(untied, tmp_path / "out", tracker)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_base_in_bin_files_comes_out_as_safetensors(untied, tmp_path, tracker, parts):
    resize(untied, tmp_path / "expected", tracker)
    names = sorted(untied.weights["base"])
    (untied.base / "model.safetensors").unlink()
    if parts == 1:
        torch.save(untied.weights["base"], untied.base / "pytorch_model.bin")
    else:
        files = {
            name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin"
            for number, name in enumerate(names)
        }
        for file in set(files.values()):
            torch.save(
                {n: v for n, v in untied.weights["base"].items() if files[n] == file},
                untied.base / file,
            )
        (untied.base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    resize(untied, tmp_path / "out", tracker)
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == parts
    expected, found = load(tmp_path / "expected"), load(tmp_path / "out")
    assert set(Checkpoint.open(tmp_path / "out").tensors) == set(names)
    assert all(torch.equal(found[name], expected[name]) for name in names)
