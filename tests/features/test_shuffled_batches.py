"""Shuffled batches of stores larger than their buffer: every row once, any step at once, well mixed."""

import threading

import pytest
import torch

from diffusion_sae._training import hold_out_images
from diffusion_sae.features import FeatureSet, FeatureSource, FeatureStore, ShuffledBatches, StoreWriter
from diffusion_sae.features.order import BlockOrder
from diffusion_sae.provenance import Provenance
from uniform_order import step_rows

LAYER, TIMESTEPS, IMAGES, POSITIONS, WIDTH = "up_ft1", (25, 700), 40, 6, 4
ROWS = IMAGES * POSITIONS
ROW_BYTES = 2 * WIDTH
MANY = 2**20
SIZES = {
    "many buffers": {"buffer_bytes": 60 * (ROW_BYTES + 16), "block_bytes": 4 * ROW_BYTES},
    "odd blocks": {"buffer_bytes": 53 * (ROW_BYTES + 16), "block_bytes": 7 * ROW_BYTES},
    "one row a block": {"buffer_bytes": 25 * (ROW_BYTES + 16), "block_bytes": 1},
    "one buffer": {},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Each row's first number is its own number, its second the timestep, at half precision; shards of seven images."""
    record = Provenance(model="m", layers=(LAYER,), timesteps=TIMESTEPS, pooling="tokens", weights="abc")
    folder, names = tmp_path_factory.mktemp("store"), [str(i) for i in range(IMAGES)]
    writer = StoreWriter(
        folder,
        record,
        source_names=names,
        labels=[None] * IMAGES,
        class_names=None,
        shard_size=7,
        store_dtype="float16",
    )
    numbers = torch.arange(ROWS).float().view(IMAGES, POSITIONS, 1).repeat(1, 1, WIDTH)
    for number in writer.missing:
        shard, rows = writer.new_shard(), writer.part.rows(number)
        features = {}
        for t in TIMESTEPS:
            features[LAYER, t] = numbers[rows].clone()
            features[LAYER, t][..., 1] = t
        shard.add(features, *([names[i] for i in rows] for _ in range(2)), [None] * len(rows))
        writer.write(number, shard)
    writer.finish()
    return FeatureStore(folder)


@pytest.fixture
def features(store):
    return store.select(LAYER, 25)


@pytest.fixture(params=SIZES)
def sizes(request):
    return SIZES[request.param]


@pytest.fixture
def count_reads(monkeypatch):
    """Rows that were read from the store, and the most that were held at once: see `test_memory_is_bounded`."""
    read, original = [], FeatureSet.stored

    def stored(self, ascending):
        if len(ascending) > 1:  # one row is read to know the type
            read.append(len(ascending))
        return original(self, ascending)

    monkeypatch.setattr(FeatureSet, "stored", stored)
    return read


def numbers(batch):
    return batch[:, 0].long()


@pytest.mark.parametrize("batch_size", [1, 7, 16, 24])
def test_every_row_once_an_epoch(features, sizes, batch_size):
    batches = ShuffledBatches(features, batch_size, seed=3, **sizes)
    per_epoch = ROWS // batch_size
    assert (len(batches), batches.steps_per_epoch, batches.d_in) == (ROWS, per_epoch, WIDTH)
    seen = [torch.cat([batches.batch(e * per_epoch + s) for s in range(per_epoch)]) for e in range(2)]
    for rows in map(numbers, seen):
        assert len(rows) == per_epoch * batch_size
        assert len(set(rows.tolist())) == len(rows)
    assert not torch.equal(*seen)
    assert seen[0].dtype == torch.float32


def test_a_batch_is_what_the_row_numbers_say(features, sizes):
    batches = ShuffledBatches(features, 16, seed=3, **sizes)
    for step in range(40):
        assert torch.equal(batches.batch(step), features[batches.rows_of(step)]), step


def test_any_step_at_once(features, sizes):
    """Resumed at every step, forwards, backwards and anew: what the undisturbed run gave."""
    undisturbed = ShuffledBatches(features, 16, seed=3, **sizes)
    expected = [undisturbed.batch(step) for step in range(40)]
    jumping = ShuffledBatches(features, 16, seed=3, **sizes)
    for step in [39, 0, 14, 15, 16, 14, *range(29, 33), 3]:
        assert torch.equal(jumping.batch(step), expected[step]), step
        assert torch.equal(ShuffledBatches(features, 16, seed=3, **sizes).batch(step), expected[step]), step
    jumping.close()
    assert torch.equal(jumping.batch(20), expected[20])


def test_the_order_depends_on_the_seed(features, sizes):
    mine, others = (ShuffledBatches(features, 16, seed=seed, **sizes) for seed in (3, 4))
    assert not torch.equal(mine.batch(0), others.batch(0))


@pytest.mark.parametrize("world", [2, 4])
def test_shares_of_processes_make_the_batch(features, sizes, world):
    whole = ShuffledBatches(features, 16, seed=3, **sizes)
    readers = [ShuffledBatches(features, 16, seed=3, **sizes) for _ in range(world)]
    for step in [*range(32), 5]:
        shares = [reader.batch(step, rank, world) for rank, reader in enumerate(readers)]
        assert [len(share) for share in shares] == [16 // world] * world
        assert torch.equal(torch.cat(shares), whole.batch(step))
        rows = [reader.rows_of(step, rank, world) for rank, reader in enumerate(readers)]
        assert torch.equal(torch.cat(rows), whole.rows_of(step))


def test_one_reader_may_ask_for_all_shares(features, sizes):
    batches = ShuffledBatches(features, 16, seed=3, **sizes)
    for step in range(16):
        shares = [batches.batch(step, rank, 2) for rank in range(2)]
        assert torch.equal(torch.cat(shares), batches.batch(step))


def test_only_the_given_rows(features, sizes):
    """Held-out images occur in no batch; the others do, each row once."""
    train, held = hold_out_images(features, 9, seed=0)
    batches = ShuffledBatches(features, 16, seed=3, rows=train.flip(0), **sizes)
    assert len(batches) == len(train)
    per_epoch = batches.steps_per_epoch
    seen = torch.cat([numbers(batches.batch(step)) for step in range(per_epoch)])
    assert len(set(seen.tolist())) == len(seen) == per_epoch * 16
    assert set(seen.tolist()) <= set(train.tolist())
    left = batches.held_out()
    assert torch.equal(left[:], features[held])
    assert left.image_ids == [features.image_ids[i] for i in features.image_index[held].unique().tolist()]
    assert torch.equal(batches.mean(), features[train].double().mean(0).float())
    everything = ShuffledBatches(features, 16, **sizes)
    assert everything.held_out() is None
    assert torch.equal(everything.mean(), features.mean())
    part = ShuffledBatches(features, 16, rows=train[5:])
    assert torch.equal(part.held_out()[:], features[held])  # whole images alone


def test_in_one_buffer_it_is_the_uniform_permutation(features):
    train, _ = hold_out_images(features, 9, seed=0)
    for rows in (None, train):
        batches = ShuffledBatches(features, 16, seed=5, rows=rows)
        chosen = torch.arange(ROWS) if rows is None else rows
        for step in (0, 7, 30):
            expected = features[chosen[step_rows(step, 16, len(chosen), seed=5)]]
            assert torch.equal(batches.batch(step), expected)


def test_rows_in_memory_are_permuted_as_a_whole_without_a_buffer(features, count_reads):
    tensor = features[:]
    batches = ShuffledBatches(FeatureSet.from_tensor(tensor), 16, seed=5, buffer_bytes=1, block_bytes=1)
    for step in (0, 7, 30):
        assert torch.equal(batches.batch(step), tensor[step_rows(step, 16, ROWS, seed=5)])
    assert count_reads == []


def test_timesteps_of_the_rows(store, sizes):
    batches = ShuffledBatches(store.select(LAYER, TIMESTEPS), 16, seed=3, **sizes)
    assert len(batches) == 2 * ROWS
    seen = []
    for step in range(batches.steps_per_epoch):
        batch, timesteps = batches.batch(step), batches.timesteps_of(step)
        assert torch.equal(batch[:, 1].long(), timesteps)
        assert torch.equal(torch.cat([batches.timesteps_of(step, rank, 2) for rank in range(2)]), timesteps)
        seen += list(zip(numbers(batch).tolist(), timesteps.tolist(), strict=True))
    assert len(set(seen)) == len(seen) == 2 * ROWS
    assert ShuffledBatches(FeatureSet.from_tensor(torch.eye(9)), 2).timesteps_of(0) is None


@pytest.mark.parametrize("timesteps", [25, (700, 25)], ids=str)
def test_moments_of_each_timestep(store, sizes, timesteps):
    features = store.select(LAYER, timesteps)
    train, held = hold_out_images(features, 9, seed=0)
    batches = ShuffledBatches(features, 16, rows=train, **sizes)
    known, mean, std = batches.moments()
    assert known == features.of_timesteps
    for number, t in enumerate(known):
        rows = features[train][features.timesteps[train] == t]
        torch.testing.assert_close(mean[number], rows.mean(0))
        torch.testing.assert_close(std[number], (rows - rows.mean(0)).pow(2).mean().sqrt())
    left = batches.held_out()
    assert torch.equal(left[:], features[held])
    assert torch.equal(left.timesteps, features.timesteps[held])
    assert left.num_images == 9
    plain = ShuffledBatches(FeatureSet.from_tensor(torch.eye(4)), 2).moments()
    assert plain.timesteps == ()
    assert plain.mean.tolist() == [[0.25] * 4]
    assert plain.std.item() == pytest.approx(0.75**0.5 / 2)


@pytest.mark.parametrize("world", [1, 2])
def test_memory_is_bounded(features, count_reads, world):
    """A buffer is read when the one before it is first needed; a process reads its share alone, and each row once."""
    batches = ShuffledBatches(features, 16, seed=3, **SIZES["many buffers"])
    assert batches.order.num_groups == 4
    per_epoch = batches.steps_per_epoch
    for step in range(per_epoch):
        batches.batch(step, world - 1, world)
        held = [future.result() for future in batches._buffers.values()]
        assert len(held) == 2
        assert sum(len(buffer.rows) for buffer in held) <= 2 * 60 // world + 16
        assert all(buffer.content.dtype == torch.float16 for buffer in held)
    assert max(count_reads) <= 60 // world + 16
    assert sum(count_reads[:-1]) == per_epoch * 16 // world  # the last one is of the next epoch


def test_after_a_jump_the_buffer_of_the_step_alone_is_read(features, count_reads):
    batches = ShuffledBatches(features, 12, seed=3, **SIZES["many buffers"])
    batches.batch(1000)
    batches.close()
    assert len(count_reads) <= 2  # it and the next one


def test_what_fits_is_read_once_for_all_epochs(features, count_reads):
    batches = ShuffledBatches(features, 16, seed=3)
    for step in range(60):
        batches.batch(step)
    for rank in range(2):
        batches.batch(3, rank, 2)
    assert count_reads == [ROWS]


def test_an_error_of_the_thread_is_raised_at_its_buffer(features, monkeypatch):
    original = FeatureSet.stored

    def fail_in_the_thread(self, ascending):
        if threading.current_thread() is not threading.main_thread():
            raise OSError("the disk is gone")
        return original(self, ascending)

    monkeypatch.setattr(FeatureSet, "stored", fail_in_the_thread)
    batches = ShuffledBatches(features, 16, seed=3, **SIZES["many buffers"])
    with pytest.raises(OSError, match="the disk is gone"):
        batches.batch(0)


def test_several_readers_do_not_disturb_one_another(features):
    sizes = SIZES["many buffers"]
    readers = [ShuffledBatches(features, 16, seed=seed, **sizes) for seed in range(3)]
    for step in range(20):
        for seed, reader in enumerate(readers):
            assert torch.equal(reader.batch(step), ShuffledBatches(features, 16, seed=seed, **sizes).batch(step))


def test_it_is_a_source(features):
    assert isinstance(ShuffledBatches(features, 16), FeatureSource)
    assert not isinstance(features, FeatureSource)
    batches = ShuffledBatches(features, 16, seed=2, **SIZES["many buffers"])
    assert repr(batches) == "ShuffledBatches(240 rows of 4, batches of 16, 4 buffers an epoch, seed 2)"
    assert batches.provenance == features.provenance


def test_the_fingerprint_covers_rows_and_order(store, features):
    train, _ = hold_out_images(features, 9, seed=0)

    def fingerprint(features=features, batch_size=16, **options):
        return ShuffledBatches(features, batch_size, **options).fingerprint()

    other = {
        fingerprint(),
        fingerprint(store.select(LAYER, 700)),
        fingerprint(batch_size=15),
        fingerprint(seed=1),
        fingerprint(rows=train),
        fingerprint(rows=torch.arange(len(train))),
        fingerprint(**SIZES["many buffers"]),
        fingerprint(**SIZES["odd blocks"]),
    }
    assert len(other) == 8
    assert fingerprint(buffer_bytes=2**20, block_bytes=64) == fingerprint()  # the same uniform order
    assert fingerprint(rows=train.flip(0)) == fingerprint(rows=train)


def classes_and_images_a_batch(positions, batch_size, **order):
    """Mean numbers of classes and of images among the rows of a batch; 100 classes stand one after another."""
    order = BlockOrder(count=MANY, batch_size=batch_size, seed=0, **order)
    images = [order.rows_of(step) // positions for step in range(0, order.steps_per_epoch, 2**16 // batch_size)]
    counts = [((of * positions * 100 // MANY).unique().numel(), of.unique().numel()) for of in images]
    return torch.tensor(counts).double().mean(0).tolist()


@pytest.mark.parametrize("positions", [1, 64, 1024], ids="{} rows an image".format)
@pytest.mark.parametrize(("batch_size", "images_share"), [(256, 0.95), (4096, 0.6)])
def test_batches_are_mixed_as_those_of_a_uniform_shuffle(positions, batch_size, images_share):
    """Of a store 16 times the buffer. By default too a buffer has 4096 blocks: a batch of as many rows then has rows of
    1 - 1/e of them, whereas a uniform shuffle hardly ever meets an image twice."""
    uniform = classes_and_images_a_batch(positions, batch_size, block_rows=1, buffer_rows=MANY)
    buffered = classes_and_images_a_batch(positions, batch_size, block_rows=16, buffer_rows=2**16)
    assert buffered[0] > 0.97 * uniform[0]
    assert buffered[1] > images_share * uniform[1]
    one_block = classes_and_images_a_batch(positions, batch_size, block_rows=2**16, buffer_rows=2**16)
    assert one_block[0] < 0.2 * uniform[0]


def test_blocks_are_read_front_to_back_and_buffers_are_of_about_equal_size():
    order = BlockOrder(count=1003, batch_size=10, seed=0, block_rows=20, buffer_rows=330)
    sizes = []
    for number in range(order.num_groups):
        rows = order._permuted(0, number).sort().values
        sizes.append(len(rows))
        breaks = rows[1:][rows[1:] != rows[:-1] + 1]
        assert len(breaks) < len(rows) / 20 + 1
        assert set((breaks % 20).tolist()) <= {0}
    assert sum(sizes) == 1003
    assert max(sizes) <= 330
    assert max(sizes) - min(sizes) <= 40
    assert len(sizes) == 4


def test_refusals(features):
    with pytest.raises(ValueError, match=r"A batch of 241 rows cannot be had from 240 rows. Choose a smaller"):
        ShuffledBatches(features, 241)
    for wrong in (0, 2.5):
        with pytest.raises(ValueError, match=rf"batch_size must be an integer ≥ 1, got {wrong}"):
            ShuffledBatches(features, wrong)
    with pytest.raises(ValueError, match=r"seed must be an integer ≥ 0, got -1"):
        ShuffledBatches(features, 16, seed=-1)
    with pytest.raises(ValueError, match=r"buffer_bytes must be an integer ≥ 1, got 0"):
        ShuffledBatches(features, 16, buffer_bytes=0)
    with pytest.raises(ValueError, match=r"block_bytes must be an integer ≥ 1, got 1.5"):
        ShuffledBatches(features, 16, block_bytes=1.5)
    for sizes in ({"buffer_bytes": 10 * 24, "block_bytes": 1}, {"buffer_bytes": 20 * 24, "block_bytes": 21 * 8}):
        with pytest.raises(ValueError, match=r"A buffer of \d+ rows is too small for batches of 16 rows and blocks of"):
            ShuffledBatches(features, 16, **sizes)
    with pytest.raises(ValueError, match=r"Batches are of rows \(d_in,\), these rows are \(8, 3, 3\). Extract with"):
        ShuffledBatches(FeatureSet.from_tensor(torch.zeros(9, 8, 3, 3)), 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([1, 240]), r"rows must lie in 0…239, got 1…240"),
        (torch.tensor([-1, 2]), r"rows must lie in 0…239, got -1…2"),
        (torch.tensor([5, 3, 5]), r"rows must not repeat, got \[5\] more than once"),
        (torch.ones(240, dtype=torch.bool), r"got torch.bool of shape \(240,\). A mask becomes numbers with"),
        (torch.zeros(0, dtype=torch.long), r"rows must be the numbers of rows, at least one"),
    ],
)
def test_rows_that_cannot_be_served(features, rows, message):
    with pytest.raises(ValueError, match=message):
        ShuffledBatches(features, 1, rows=rows)


def test_steps_and_shares_that_do_not_exist(features):
    batches = ShuffledBatches(features, 16)
    with pytest.raises(ValueError, match=r"step must be an integer ≥ 0, got -1"):
        batches.batch(-1)
    with pytest.raises(ValueError, match=r"rank must be an integer in 0…1, got 2"):
        batches.batch(0, 2, 2)
    with pytest.raises(ValueError, match=r"A batch of 16 rows cannot be shared equally by 3 processes. Choose a batch"):
        batches.batch(0, 0, 3)
    with pytest.raises(ValueError, match=r"world must be an integer ≥ 1, got 0"):
        batches.rows_of(0, 0, 0)
