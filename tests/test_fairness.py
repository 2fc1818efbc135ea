"Accuracy by group and DEO, against fairlearn; on sets whose bias has other values than there are classes, against pandas."
import numpy as np, pandas as pd, pytest, torch
from fairlearn.metrics import MetricFrame, equalized_odds_difference
from sklearn.metrics import accuracy_score
from bias_distill.data.names import seeded
from bias_distill.data.split import Split, majority
from bias_distill.networks.testing import by_group
from bias_distill.weights.report import weight_report
from bias_distill.weights.weighting import oracle, uniform

def predicted(classes, values, n=3000, members=3):
    "A test set of groups of uneven size, and predictions that lean to the bias."
    def draw(most, *what): return torch.randint(most, (n,), generator=seeded(classes, values, *what))
    y, b = draw(classes, 'y'), draw(values*values, 'b')//values
    pred = torch.stack([torch.where(draw(3, 'right', m) > 0, y, (y+b+draw(2, 'wrong', m)) % classes) for m in range(members)])
    usual = majority(y, b, classes, values)
    return pred, Split(torch.zeros(n,3,2,2).byte(), y, b, usual)

SHAPES = [(10,10), (10,2), (3,4), (2,2)]  # cmnist_fg, cifar10_s, utkface_race, celeba

@pytest.mark.parametrize('classes,values', SHAPES)
def test_deo_is_fairlearns(classes, values):
    pred, split = predicted(classes, values)
    r = by_group(pred, split)
    y, b = split.y.numpy(), split.b.numpy()
    for k,p in enumerate(pred.numpy()):
        groups = MetricFrame(metrics=accuracy_score, y_true=y, y_pred=p, sensitive_features=b, control_features=y)
        apart = 100*groups.difference(method='between_groups')
        assert r['deo_m'][k] == pytest.approx(apart.max()) and r['deo_a'][k] == pytest.approx(apart.mean()) and 0 < apart.max()
        np.testing.assert_allclose(np.array(r['group_accuracy'][k]), 100*groups.by_group.unstack().to_numpy(float))
        assert r['worst_group'][k] == pytest.approx(100*groups.by_group.min()) and r['accuracy'][k] == pytest.approx(100*groups.overall @ np.bincount(y)/len(y))

def test_deo_of_two_classes_is_the_equalised_odds_difference():
    pred, split = predicted(2, 2)
    r = by_group(pred, split)
    for name,agg in dict(deo_m='worst_case', deo_a='mean').items():
        want = [100*equalized_odds_difference(split.y, p, sensitive_features=split.b, agg=agg) for p in pred]
        assert r[name] == pytest.approx(want)

@pytest.mark.parametrize('classes,values', SHAPES)
def test_aligned_and_conflicting_by_pandas(classes, values):
    "The usual value of a class is the most frequent, and what goes against it conflicts: in accuracies and in weights."
    pred, split = predicted(classes, values)
    table = pd.DataFrame(dict(y=split.y, b=split.b, right=pred[0] == split.y))
    table['conflicting'] = table.b != table.y.map(table.groupby('y').b.agg(lambda o: o.mode()[0]))
    accuracy, r = 100*table.groupby('conflicting').right.mean(), by_group(pred, split)
    assert r['aligned'][0] == pytest.approx(accuracy[False]) and r['conflicting'][0] == pytest.approx(accuracy[True])
    assert split.conflicting.tolist() == table.conflicting.tolist() and 0 < table.conflicting.mean() < 1
    told = {w.name: weight_report(w, split, classes, 64, generator=seeded(0)) for w in (uniform(), oracle(y=split.y, b=split.b))}
    in_class = table.groupby('y').conflicting.mean().mean()
    assert told['uniform']['weight_on_conflicting'] == pytest.approx(in_class, abs=.05) and told['uniform']['auroc'] == .5
    assert told['oracle']['weight_on_conflicting'] == pytest.approx(1-1/values, abs=.05)

def test_without_a_table_nothing_is_new():
    "Value c belongs to class c, said or not: the same accuracies, to the bit."
    pred, split = predicted(10, 10)
    said, unsaid = (by_group(pred, Split(split.x, split.y, split.b, o)) for o in (torch.arange(10), None))
    assert said == unsaid
