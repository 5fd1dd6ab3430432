"""Compositional tests in the published forms equal loops over their examples."""

from __future__ import annotations

import itertools
import json

import jax
import numpy as np
import pytest
from helpers.loss_oracles import cases2, oracles2
from helpers.small_shards import write_tar
from PIL import Image
from test_evals import DATA, SIZE, E, embed_image, embed_text, make, make_params, tokenise

from bigalign.data.samples.rejects import Rejected
from bigalign.evals import compositional
from bigalign.evals.chance import chance
from bigalign.evals.compositional import prefers_first, winoground

MESHES = [dict(devices=jax.devices()[:1]), dict(data=4, tensor=2)]
SETS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


@pytest.mark.parametrize("case", cases2("winoground"))
def test_the_scores_of_winoground(case):
  got = {name: x.mean() for name, x in winoground(oracles2().inputs(case)["sim"]).items()}
  oracles2().check(case, got, rtol=1e-9, require=("text", "image", "group"))


def test_equal_similarities_and_nan_are_never_correct():
  for changes in itertools.product((2.0, 1.0, np.nan), repeat=4):
    sims = np.array(changes).reshape(1, 2, 2)
    a, b, c, d = changes
    text, image = a > b and d > c, a > c and d > b
    found = {name: x.item() for name, x in winoground(sims).items()}
    assert found == dict(text=text, image=image, group=text and image)
  there = np.array([[True, True, False], [True, True, True], [True, False, False]])
  for changes in itertools.product((2.0, 1.0, np.nan), repeat=3):
    a, b, c = changes
    found = prefers_first(np.array([changes] * 3), there)
    assert found.tolist() == [a > b, a > b and a > c, False]  # without a wrong caption


def test_chance_of_winoground_is_that_of_random_orders():
  orders = np.array([*itertools.permutations(range(4))]).reshape(-1, 2, 2)
  expected = {f"val/w-compositional-x-{name}": s.mean() for name, s in winoground(orders).items()}
  assert chance(expected | {"val/w-compositional-x-num_samples": 3}) == pytest.approx(expected)
  metrics = {"val/s-compositional-x-accuracy": 0.7, "val/s-compositional-x-chance": 0.2}
  assert chance(metrics) == {"val/s-compositional-x-accuracy": 0.2}


class Pictures:
  """Random images in a folder, and what the model sees of them."""

  def __init__(self, folder):
    self.folder, self.rng = folder, np.random.default_rng(0)
    folder.mkdir(parents=True)

  def add(self, name, size=SIZE):
    pixels = self.rng.integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(self.folder / name, "png")
    return pixels

  def word(self):
    return "".join(self.rng.choice([*"abcdefgh"], 6))


def cosines(params, pixels, captions):
  z = np.asarray(embed_image(params, np.stack([DATA.evaluation_view(pixels)])))[0]
  return np.asarray(embed_text(params, *tokenise(captions))) @ z


def values(found, name="x"):
  start = f"val/{name}-compositional-"
  assert all(key.startswith(start) for key in found)
  return {key.removeprefix(start): x for key, x in found.items()}


@pytest.fixture
def sugar(tmp_path):
  """Sets of 3 to 9 examples in SugarCrepe's form; a missing file, a broken one, a missing text."""
  pictures, expected = Pictures(tmp_path / "coco"), {}
  (tmp_path / "data").mkdir()
  params = make_params(1)
  for n, name in enumerate(SETS):
    records, correct = {}, []
    for i in range(3 + n):
      file, texts = f"{name}{i}.png", [pictures.word(), pictures.word()]
      record = dict(filename=file, caption=texts[0], negative_caption=texts[1])
      pixels = pictures.add(file)
      if (n, i) == (1, 0):
        (pictures.folder / file).unlink()
      elif (n, i) == (1, 2):
        (pictures.folder / file).write_bytes(b"no image")
      elif (n, i) == (2, 3):
        del record["negative_caption"]
      elif (n, i) == (2, 4):
        record["caption"] = " "
      else:
        a, b = cosines(params, pixels, texts)
        correct.append(a > b)
      records[str(i)] = record
    (tmp_path / f"data/{name}.json").write_text(json.dumps(records))
    expected |= {f"{name}-accuracy": np.mean(correct), f"{name}-num_samples": len(correct)}
    expected[f"{name}-chance"] = 0.5
    if len(correct) < len(records):
      expected[f"{name}-rejected"] = len(records) - len(correct)
  for kind in ("add", "replace", "swap"):
    own = [expected[f"{name}-accuracy"] for name in SETS if name.startswith(kind)]
    expected[f"{kind}-mean_accuracy"] = np.mean(own)
  return dict(folder=f"{tmp_path}/data", images=f"{tmp_path}/coco"), expected


@pytest.mark.parametrize("axes", MESHES)
def test_sugar_crepe_equals_a_loop(sugar, axes, caplog):
  options, expected = sugar
  options = dict(type="compositional", batch_size=10, **options)  # 42 examples
  found = values(make("x", options, **axes)(make_params(1)))
  assert found == pytest.approx(expected, abs=1e-12)
  assert expected["add_obj-rejected"] == expected["replace_att-rejected"] == 2
  # Each is named by its set, its place and its file.
  for text in ("add_obj/0/add_obj0.png", "add_obj/2/add_obj2.png", "replace_att", "no_caption"):
    assert text in caplog.text
  assert "2 no_caption" in caplog.text and "1 no_image, 1 undecodable" in caplog.text


def test_sets_of_sugar_crepe_that_are_missing_are_named(sugar, tmp_path):
  options, expected = sugar
  (tmp_path / "data/add_obj.json").unlink()
  (tmp_path / "data/swap_att.json").unlink()
  with pytest.raises(
    FileNotFoundError,
    match=r"config\.evals\.x\.folder=.* lacks 2 sets, \['add_obj', 'swap_att'\].*`sets` chooses",
  ):
    make("x", dict(type="compositional", **options))
  options |= dict(sets=("replace_att", "swap_obj", "replace_obj", "replace_rel"))
  found = values(make("x", dict(type="compositional", **options))(make_params(1)))
  kept = ("replace", "swap_obj")  # no mean of a kind without all of its sets
  assert found == pytest.approx({k: x for k, x in expected.items() if k.startswith(kept)})
  with pytest.raises(FileNotFoundError, match=r"lacks 1 sets, \['swap_rel'\]; it has \['add_att'"):
    make("x", dict(type="compositional", **options | dict(sets=("swap_rel",))))


def winoground_files(folder, n=7, jsonl=True):
  """n examples with images without endings; one of example 2 is missing, a caption of example 4."""
  pictures, records, sims = Pictures(folder / "images"), [], []
  params = make_params(1)
  for k in range(n):
    names = [f"ex_{k}_img_{i}" for i in (0, 1)]
    texts = [pictures.word(), pictures.word()]
    pixels = [pictures.add(f"{name}.png") for name in names]
    record = dict(id=k, image_0=names[0], image_1=names[1], caption_0=texts[0], caption_1=texts[1])
    if k == 2:
      (pictures.folder / f"{names[1]}.png").unlink()
    elif k == 4:
      del record["caption_0"]
    else:
      sims.append([cosines(params, x, texts) for x in pixels])
    records.append(record)
  lines = "".join(json.dumps(record) + "\n" for record in records)
  (folder / "examples.jsonl").write_text(lines)
  return {name: x.mean() for name, x in winoground(np.array(sims)).items()} | {
    "num_samples": n - 2,
    "rejected": 2,
  }


@pytest.mark.parametrize("axes", MESHES)
def test_winoground_equals_a_loop(tmp_path, axes):
  expected = winoground_files(tmp_path, n=21)
  options = dict(type="compositional", folder=str(tmp_path), batch_size=9)  # odd on one device
  found = values(make("x", options, **axes)(make_params(1)))
  assert found == pytest.approx({f"examples-{k}": x for k, x in expected.items()})
  assert 0 < expected["text"] < 1 and 0 < expected["image"] < 1


def aro_files(folder):
  """Relations in boxes, attributes, and several wrong captions; what a loop finds."""
  pictures, params, sets = Pictures(folder / "images"), make_params(1), {}
  relations, correct = [], []
  for i in range(9):
    pixels = pictures.add(f"{i}.png", size=12)
    texts = [pictures.word(), pictures.word()]
    x, y, w, h = i % 5, 2, 7, 5 + i  # the last ones end below the image
    seen = np.zeros((h, w, 3), np.uint8)
    inside = pixels[y : y + h, x : x + w]
    seen[: inside.shape[0], : inside.shape[1]] = inside
    record = dict(image_path=f"{i}.png", true_caption=texts[0], false_caption=texts[1])
    record |= dict(bbox_x=x, bbox_y=y, bbox_w=w, bbox_h=h, relation_name=["on", "by", "in"][i % 3])
    relations.append(record)
    a, b = cosines(params, seen, texts)
    correct.append(a > b)
  correct = np.array(correct)
  sets["visual_genome_relation"] = relations
  expected = {
    "visual_genome_relation-accuracy": correct.mean(),
    "visual_genome_relation-mean_group_accuracy": np.mean([correct[k::3].mean() for k in range(3)]),
    "visual_genome_relation-num_groups": 3,
    "visual_genome_relation-num_samples": 9,
    "visual_genome_relation-chance": 0.5,
  }
  attributes, of = [], {"red_big": [], "wet_old": []}
  for i in range(30):
    name, texts = f"{i % 9}.png", [pictures.word(), pictures.word()]
    pair = "wet_old" if i < 26 else "red_big"  # four are too few
    record = dict(image_path=name, true_caption=texts[0], false_caption=texts[1])
    attributes.append(record | dict(attributes=pair.split("_")))
    a, b = cosines(params, np.asarray(Image.open(folder / "images" / name)), texts)
    of[pair].append(a > b)
  sets["visual_genome_attribution"] = attributes
  expected |= {
    "visual_genome_attribution-accuracy": np.mean([*of["wet_old"], *of["red_big"]]),
    "visual_genome_attribution-mean_group_accuracy": np.mean(of["wet_old"]),
    "visual_genome_attribution-num_groups": 1,
    "visual_genome_attribution-num_samples": 30,
    "visual_genome_attribution-chance": 0.5,
  }
  order, right = [], []
  for i in range(6):
    texts = [pictures.word() for _ in range(5 if i else 2)]
    order.append(dict(image=f"{i}.png", caption_options=texts))
    all_sims = cosines(params, np.asarray(Image.open(folder / f"images/{i}.png")), texts)
    right.append(all_sims[0] > all_sims[1:].max())
  sets["coco_order"] = order
  expected |= {
    "coco_order-accuracy": np.mean(right),
    "coco_order-num_samples": 6,
    "coco_order-chance": (5 / 5 + 1 / 2) / 6,
  }
  for name, records in sets.items():
    (folder / f"{name}.json").write_text(json.dumps(records))
  return expected, correct


@pytest.mark.parametrize("axes", MESHES)
def test_aro_equals_a_loop(tmp_path, axes):
  expected, correct = aro_files(tmp_path)
  options = dict(type="compositional", folder=str(tmp_path), batch_size=10)
  assert values(make("x", options, **axes)(make_params(1))) == pytest.approx(expected)
  some = options | dict(sets=("visual_genome_relation",), without=("by",))
  found = values(make("x", some, **axes)(make_params(1)))
  left = np.delete(correct, np.s_[1::3])
  assert found["visual_genome_relation-accuracy"] == pytest.approx(left.mean())
  assert found["visual_genome_relation-num_groups"] == 2
  with pytest.raises(ValueError, match=r"x\.without: no example has \['under'\]; the groups are"):
    make("x", options | dict(without=("under",)))


def test_a_collapsed_model_is_never_correct(tmp_path):
  winoground_files(tmp_path / "w")
  aro_files(tmp_path / "aro")
  flat = (lambda p, x: np.ones((len(x), E)), lambda p, ids, mask: np.ones((len(ids), E)))
  nan = (lambda p, x: np.full((len(x), E), np.nan), flat[1])
  for towers, part in itertools.product((flat, nan), ("w", "aro")):
    options = dict(type="compositional", folder=f"{tmp_path}/{part}")
    found = make("x", options, towers=towers)(make_params())
    scores = [
      x for name, x in found.items() if name.endswith(("accuracy", "text", "image", "group"))
    ]
    assert scores and not any(scores)


def test_captions_of_a_source(tmp_path):
  """The first caption of the first field is correct; sample 2 has no wrong caption."""
  pictures, members, correct = Pictures(tmp_path / "images"), [], []
  for i in range(5):
    texts = [pictures.word() for _ in range(3)]
    pixels = pictures.add(f"{i}.png")
    wrong = [] if i == 2 else texts[1 : 2 + i % 2]
    stored = json.dumps(dict(caption=texts[0], wrong=wrong)).encode()
    members += [(f"{i}.png", (tmp_path / f"images/{i}.png").read_bytes()), (f"{i}.json", stored)]
    sims = cosines(make_params(1), pixels, [texts[0], *wrong])
    correct += [] if i == 2 else [sims[0] > sims[1:].max()]
  source = write_tar(tmp_path / "a.tar", members)
  options = dict(type="compositional", source=source, fields=("json.caption", "json.wrong"))
  found = values(make("x", options)(make_params(1)))
  expected = dict(accuracy=np.mean(correct), num_samples=4, rejected=1)
  assert found == pytest.approx(expected | dict(chance=(2 / 2 + 2 / 3) / 4))


def test_a_source_without_fields_has_no_captions():
  record = dict(texts=dict(caption=("an ant", "a bee")), captions=())
  with pytest.raises(Rejected, match="0 captions; expected one and a wrong one"):
    compositional._choices(record, ())


def test_files_of_another_form_are_named(tmp_path):
  def fails(message, kind=ValueError, **options):
    with pytest.raises(kind, match=message):
      make("x", dict(type="compositional", **options))(make_params())

  fails("config.evals.x: give `folder` or `source`, one of them")
  fails("config.evals.x: give `folder` or `source`", folder="a", source="b")
  fails("images, sets and without have an effect", source="b", images="c")
  fails("fields has an effect with `source` only", folder="b", fields=("txt",))
  fails(r"folder='nowhere': nowhere does not exist", FileNotFoundError, folder="nowhere")
  fails(r"holds no \.json or \.jsonl file", FileNotFoundError, folder=str(tmp_path))
  for text, message in (
    ("{", "is not JSON"),
    ("[]", "expected a list of records"),
    ("[1]", "expected a list of records"),
    ('[{"image": "a.png", "caption": "b"}]', r"no record has 'filename', .*\['caption', 'image'\]"),
  ):
    (tmp_path / "a.json").write_text(text)
    fails(rf"a\.json.*{message}", folder=f"{tmp_path}/a.json")
  record = dict(filename="a.png", caption="b", negative_caption="c")
  for changes in (dict(), dict(filename="../a.png"), dict(filename=None), dict(bbox_x="left")):
    (tmp_path / "a.json").write_text(json.dumps([record | changes]))
    fails(r"x: all 1 examples of .*a\.json are rejected", folder=str(tmp_path))
  fails("images='no': no is not a folder", FileNotFoundError, folder=str(tmp_path), images="no")


def test_a_box_that_does_not_fit_its_image_is_rejected(tmp_path, caplog):
  Pictures(tmp_path / "images").add("a.png")
  record = dict(image_path="a.png", true_caption="b", false_caption="c")
  boxes = [(0, 0, 4, 4), (0, 0, 0, 4), (0, 0, 10**9, 4), (-5, 0, 2, 2)]
  records = [record | dict(zip(("bbox_x", "bbox_y", "bbox_w", "bbox_h"), box)) for box in boxes]
  (tmp_path / "a.json").write_text(json.dumps(records))
  found = values(make("x", dict(type="compositional", folder=str(tmp_path)))(make_params()))
  assert found["a-num_samples"] == 1 and found["a-rejected"] == 3
  assert "does not fit its 4 x 4 pixels" in caplog.text


def test_files_that_name_images_elsewhere_read_none(tmp_path, caplog):
  Pictures(tmp_path / "outside").add("a.png")
  Pictures(tmp_path / "in/images").add("b.png")
  names = ["../../outside/a.png", f"{tmp_path}/outside/a.png", "b.png"]
  records = [dict(filename=name, caption="b", negative_caption="c") for name in names]
  (tmp_path / "in/a.json").write_text(json.dumps(records))
  found = values(make("x", dict(type="compositional", folder=f"{tmp_path}/in"))(make_params()))
  assert found["a-num_samples"] == 1 and found["a-rejected"] == 2
