"""The environments keep Gymnasium's contract, and pay what training and evaluation would."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence

import rporec.envs
from rporec.baselines.popularity import Popularity
from rporec.config import Config, ConfigError, HeadConfig, SyntheticConfig
from rporec.data import DataError, Dataset, build, write_synthetic
from rporec.data.slices import held_rows
from rporec.envs.opening import small_world
from rporec.evaluation.ranking import ndcg, ranks
from rporec.files import write_json
from rporec.models.head_inputs import HeadInputs
from rporec.models.rechead import RecHead
from rporec.run import Run
from rporec.text.prompt import ItemWriter
from rporec.text.teacher import TemplateTeacher, tokenizer_texts
from rporec.text.tokenizer import fit_tokenizer

IDS = [rporec.envs.NEXT_ITEM, rporec.envs.SESSION]
ACTIONS = ["tokens", "scores"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder / "raw", SyntheticConfig(users=80, series=8, volumes=3, genres=4, studios=4, length=7), 5)
    build(folder / "raw/interactions.parquet", folder / "raw/items.parquet", folder / "built", window=6)
    return folder / "built"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """As little of a run directory as an environment needs."""
    dataset = Dataset.load(data)
    config = Config(seed=3, head=HeadConfig(fusion="residual", history="sequence", experts=False, dim=16))
    run = Run.create(tmp_path_factory.mktemp("runs") / "small", config, resume=False)
    write_json(run.folder / "data.json", {"path": str(data)})
    writer = ItemWriter(dataset, config.text)
    fit_tokenizer(tokenizer_texts(writer), config.tiny.vocabulary).save_pretrained(run.backbone)
    RecHead(dataset.catalog, config.head, window=dataset.window, seed=7).save(run.head())
    return run


def make(id_=rporec.envs.NEXT_ITEM, **arguments):
    return gymnasium.make(id_, **arguments).unwrapped


@pytest.mark.parametrize("id_", IDS)
@pytest.mark.parametrize("action", ACTIONS)
def test_gymnasium_finds_nothing_to_complain_about(id_, action):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*Box action space")  # scores have no bounds, and that is meant
        check_env(make(id_, action=action))


@pytest.mark.parametrize("exclude_history", [True, False])
def test_popularity_steps_scores_and_earns_the_ndcg_that_evaluation_computes(data, exclude_history):
    env = make(data=data, action="scores", split="test", exclude_history=exclude_history)
    dataset = env.task.dataset
    popularity, samples = Popularity.fit(dataset, held_rows(dataset)), dataset.split("test")
    rewards, infos = [], []
    for sample in samples:
        env.reset(options={"sample": sample})
        _, reward, over, _, info = env.step(popularity.scores(dataset, np.array([sample]))[0])
        assert over
        rewards.append(reward)
        infos.append(info)
    seen = dataset.seen_of(samples) if exclude_history else None
    expected = ranks(popularity.scores(dataset, samples), dataset.targets(samples), seen)
    assert [info["rank"] for info in infos] == expected.tolist()
    assert [info["target"] for info in infos] == dataset.targets(samples).tolist()
    assert np.mean(rewards) == pytest.approx(ndcg(expected).mean(), rel=1e-6)
    assert infos[0]["reward_parts"] == {"ndcg": rewards[0]}


def test_scores_leave_out_earlier_items_unless_told_otherwise():
    by_default, counted = make(action="scores"), make(action="scores", exclude_history=False)
    sample = max(by_default.task.samples, key=lambda s: len(by_default.task.dataset.seen(s)))
    scores = np.zeros(by_default.action_space.shape, np.float32)
    scores[by_default.task.dataset.seen(sample)] = 1.0
    paid = []
    for env in (by_default, counted):
        env.reset(options={"sample": sample})
        paid.append(env.step(scores)[1])
    assert paid[0] > paid[1]


def test_the_teachers_text_is_well_formed_and_ranks_the_target_higher_than_noise():
    env = make()
    teacher, rng = TemplateTeacher(env.task.writer.items), np.random.default_rng(0)
    taught, noise = [], []
    for sample in env.task.samples[:20]:
        target = env.task.dataset.targets([sample])[0]
        text = teacher.rationale(env.task.dataset.history(sample), target)
        for action, infos in ((env.task.encode(text), taught), (rng.integers(2, 300, 64), noise)):
            env.reset(options={"sample": sample})
            *_, info = env.step(action)
            infos.append(info)
    assert all(info["reward_parts"]["format"] == 1 for info in taught)
    assert not any(info["reward_parts"]["format"] for info in noise)
    gains = [np.mean([info["reward_parts"]["ndcg"] for info in infos]) for infos in (taught, noise)]
    assert gains[0] > gains[1] + 0.3


def test_a_completion_ends_at_the_first_end_or_padding_token():
    env = make()
    text = "<think> a .</think><answer> b</answer>"
    end = env.task.tokenizer.eos_token_id
    ids = env.task.tokenizer.encode(text, add_special_tokens=False)
    outcomes = [
        env.task.score([5], [np.array(action)])[0]
        for action in (ids, env.task.encode(text), [*ids, end, *ids], [*ids, *ids])
    ]
    assert outcomes[0].parts["format"] == outcomes[0].parts["outside"] == 1
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[3].reward == 0


def test_the_observation_is_the_prompt_of_training_and_the_padded_history(data):
    env = make(data=data)
    for sample in env.task.samples[[0, -1]]:
        seen, info = env.reset(options={"sample": sample})
        history = env.task.dataset.history(sample)
        assert seen["prompt"][: seen["prompt_length"]].tolist() == env.task.writer.prompts([sample])[0]
        assert (seen["prompt"][seen["prompt_length"] :] == env.task.tokenizer.pad_token_id).all()
        assert seen["history"].tolist() == [*history, *[-1] * (6 - len(history))]
        assert info["sample"] == info["next_sample"] == sample
        assert set(info) == {"sample", "next_sample", "user_id"}


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_session_walks_the_users_log_and_stays_in_its_split(data, split):
    env = make(rporec.envs.SESSION, data=data, action="scores", split=split, horizon=3)
    dataset, lengths = env.task.dataset, []
    for first in env.task.samples:
        user, row = dataset.sample_user[first], dataset.sample_row[first]
        rows = dataset.sample_row[env.task.samples[dataset.sample_user[env.task.samples] == user]]
        _, info = env.reset(options={"sample": first})
        targets, over = [], False
        while not over:
            asked = info["next_sample"]
            seen, _, over, cut, info = env.step(np.zeros(env.action_space.shape, np.float32))
            assert not cut
            assert info["sample"] == asked
            assert info["user_id"] == dataset.user_ids[user]
            targets.append(info["target"])
            taken = dataset.items[dataset.offsets[user] : row + len(targets)][-6:]
            assert seen["history"][seen["history"] >= 0].tolist() == taken.tolist()
        assert targets == dataset.items[row : min(row + 3, rows.max() + 1)].tolist()
        assert info["next_sample"] == -1
        lengths.append(len(targets))
    assert set(lengths) == {1, 2, 3}


def test_a_step_after_the_end_asks_for_a_reset():
    env = make(action="scores")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        env.step(env.action_space.sample())


def test_a_seed_fixes_the_samples_and_another_seed_draws_others():
    def drawn(seed):
        env = make(action="scores")
        return [env.reset(seed=seed)[1]["sample"], *(env.reset()[1]["sample"] for _ in range(20))]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_the_small_world_and_its_vocabulary_are_the_same_whenever_they_are_made():
    (ours, our_writer), (theirs, their_writer) = small_world(), small_world.__wrapped__()
    assert ours is not theirs
    assert ours.items.tolist() == theirs.items.tolist()
    assert ours.sample_split.tolist() == theirs.sample_split.tolist()
    assert our_writer.tokenizer.get_vocab() == their_writer.tokenizer.get_vocab()


@pytest.mark.parametrize("id_", IDS)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_the_vector_form_equals_single_environments_step_by_step(id_, action, mode):
    single = {"vectorization_mode": "sync", "vector_kwargs": {"autoreset_mode": mode}}
    expected = gymnasium.make_vec(id_, num_envs=3, action=action, **single)
    batched = gymnasium.make_vec(id_, num_envs=3, action=action, autoreset_mode=mode)
    assert type(batched) is not type(expected)
    assert batched.metadata["autoreset_mode"].value == mode
    assert batched.observation_space == expected.observation_space
    assert batched.action_space == expected.action_space
    assert data_equivalence(batched.reset(seed=11), expected.reset(seed=11))
    batched.action_space.seed(0)
    ended = 0
    for _ in range(9):
        actions = batched.action_space.sample()
        ours, theirs = batched.step(actions), expected.step(actions)
        assert data_equivalence(ours, theirs)
        ended += ours[2].sum()
    assert ended >= 3


def test_the_vector_form_asks_the_head_once_a_step(monkeypatch):
    sizes, scores = [], RecHead.scores

    def counted(self, inputs):
        sizes.append(len(inputs))
        return scores(self, inputs)

    monkeypatch.setattr(RecHead, "scores", counted)
    env = gymnasium.make_vec(rporec.envs.NEXT_ITEM, num_envs=4)
    env.reset(seed=0)
    for _ in range(4):
        env.step(env.action_space.sample())
    assert sizes == [4, 4]  # every other step resets all rows


def test_a_run_brings_its_data_its_tokenizer_and_its_head(run, data):
    env = make(run=run.folder, split="valid")
    dataset, sample = Dataset.load(data), int(env.task.samples[3])
    target = dataset.targets([sample])
    answer = env.task.writer.items.short(int(target[0]))
    env.reset(options={"sample": sample})
    _, reward, _, _, info = env.step(env.task.encode(f"ab<think> c .</think><answer> {answer}</answer>"))

    head = RecHead.load(run.head(), dataset.catalog)
    one = np.ones(1, np.float32)
    inputs = HeadInputs([dataset.seen(sample)], dataset.times([sample]), [" c ."], [f" {answer}"], one)
    rank = ranks(head.scores(inputs).numpy(), target)
    assert info["rank"] == rank[0]
    assert info["reward_parts"] == pytest.approx({"format": 1, "outside": 0.98, "ndcg": ndcg(rank)[0]})
    assert reward == pytest.approx(0.1 + 0.1 * 0.98 + 0.5 * ndcg(rank)[0])


def test_excluding_history_reaches_the_judge_of_a_run(run):
    paid = []
    for exclude in (None, False, True):
        env = make(run=run.folder, exclude_history=exclude)
        sample = max(env.task.samples, key=lambda s: len(env.task.dataset.seen(s)))
        env.reset(options={"sample": sample})
        paid.append(env.step(env.task.encode("<think> c .</think><answer> x</answer>"))[4]["rank"])
    assert paid[0] == paid[1] > paid[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "items"}, "action: 'items' is neither"),
        ({"split": "first"}, "split: 'first' is none of train, valid, test"),
        ({"data": "a", "run": "b"}, "give one of them"),
        ({"run": "no/such/run"}, "no such run"),
    ],
)
def test_arguments_that_name_nothing_are_refused_in_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(**arguments)


def test_a_horizon_a_batch_and_a_folder_must_exist(tmp_path):
    for horizon in (0, 2.5, True):
        with pytest.raises(ConfigError, match="horizon"):
            make(rporec.envs.SESSION, horizon=horizon)
    with pytest.raises(ConfigError, match="num_envs: 0"):
        gymnasium.make_vec(rporec.envs.NEXT_ITEM, num_envs=0)
    with pytest.raises(DataError, match="no data set"):
        make(data=tmp_path)


def test_a_sample_of_another_split_is_refused():
    env = make(action="scores")
    with pytest.raises(ConfigError, match="is in split 'test'"):
        env.reset(options={"sample": env.task.dataset.split("test")[0]})
    with pytest.raises(ConfigError, match="there is no sample 99999"):
        env.reset(options={"sample": 99999})


@pytest.mark.parametrize(
    ("action", "value", "message"),
    [
        ("scores", np.zeros(3), "a score of every item"),
        ("scores", np.full(60, np.nan), "not finite"),
        ("tokens", np.full(64, 10**6), "the vocabulary has"),
        ("tokens", np.zeros(65, np.int64), "up to 64 token ids"),
        ("tokens", np.zeros(4), "float64"),
    ],
)
def test_actions_outside_the_space_are_refused(action, value, message):
    env = make(action=action)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(value)
