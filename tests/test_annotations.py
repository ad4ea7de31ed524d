"Annotation files as their publishers write them: counts of the real ones, tiny sets in each official layout, damaged files, classes that do not fit, the data set's card"
import json
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from torch import nn

from conftest import noise_video
from tsd.annotations import check_classes, folder_table, hmdb51_table, kinetics_table, read_classes, ssv2_table, ucf101_table
from tsd.data import VideoDataLoaders
from tsd.video import encode

SMALL = dict(frames=4, stride=1, size=32, bs=2, num_workers=0)
KINETICS = 'label,youtube_id,time_start,time_end,split,is_cc\n'

@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    "One tiny video, H.264 in .mp4; copies of it stand for those of a data set"
    path = tmp_path_factory.mktemp('one')/'clip.mp4'
    noise_video(path, 6, 40, 48)
    return path

@pytest.fixture
def layout(clip, tmp_path):
    "A function that lays out a folder: copies of the clip at `videos`, text at the keys of `texts`"
    def make(videos, texts={}):
        for o in [*videos, *texts]: (tmp_path/o).parent.mkdir(parents=True, exist_ok=True)
        for o in videos: shutil.copy(clip, tmp_path/o)
        for o,text in texts.items(): (tmp_path/o).write_text(text)
        return tmp_path
    return make

def sizes(dls): return [len(dl.dataset) for dl in dls.loaders]
def below(root, dls): return [[o.path.relative_to(root).as_posix() for o in dl.dataset.items] for dl in dls.loaders]

# --- the real files: sizes as published, and read once more in another way

def test_kinetics_validation_file(shared, tmp_path):
    file = shared/'annotations/kinetics400/kinetics-400_val.csv'
    t = kinetics_table(tmp_path, file)
    raw = pd.read_csv(file)
    assert len(t) == 19906 and t.label.nunique() == 400 and list(t.label) == list(raw.label) and set(t.split) == {'valid'}
    assert list(t.label.cat.categories) == read_classes(shared/'annotations/kinetics400/label_map.txt') == sorted(set(raw.label))
    assert t.path.astype(str).tolist() == [f'val/{r.label}/{r.youtube_id}_{r.time_start:06d}_{r.time_end:06d}.mp4' for r in raw.itertuples()]

def test_ssv2_files(shared, tmp_path):
    notes = shared/'annotations/ssv2'
    clips = json.loads((notes/'something-something-v2-validation.json').read_text())
    (tmp_path/'something-something-v2-train.json').write_text(json.dumps([{**clips[0], 'id': '1000000'}]))   # the one for training is not at hand
    for o in 'labels','validation': shutil.copy(notes/f'something-something-v2-{o}.json', tmp_path)
    t = ssv2_table(tmp_path)
    numbers = {k:int(v) for k,v in json.loads((notes/'something-something-v2-labels.json').read_text()).items()}
    assert len(t) == 24778 and len(t.label.cat.categories) == t.label.nunique() == 174
    assert t.label.cat.codes.tolist()[1:] == [numbers[o['template'].replace('[', '').replace(']', '')] for o in clips]
    assert t.path.astype(str).tolist()[1:] == [o['id']+'.webm' for o in clips]

@pytest.mark.parametrize('split, train, test', [(1,9537,3783), (2,9586,3734), (3,9624,3696)])
def test_ucf101_files(shared, tmp_path, split, train, test):
    t = ucf101_table(tmp_path, shared/'annotations/ucf101', split)
    assert Counter(t.split) == dict(train=train, test=test) and t.label.nunique() == 101 and t.group.nunique() == 2525 and t.path.nunique() == 13320
    assert list(t.label.cat.categories) == [o.split()[1] for o in (shared/'annotations/ucf101/classInd.txt').read_text().splitlines()]
    assert t.groupby('group').split.nunique().max() == 1

def test_hmdb51_files(shared, tmp_path):
    t = hmdb51_table(tmp_path, shared/'annotations/hmdb51')
    assert Counter(t.split) == dict(train=3570, test=1530) and t.label.nunique() == 51
    assert set(Counter(zip(t.label, t.split)).items()) == {((k,s),n) for k in t.label.cat.categories for s,n in (('train',70), ('test',30))}
    assert t.groupby('group').split.nunique().max() == 1 and t.group.nunique() < len(t)/2   # films, not clips
    assert hmdb51_table(tmp_path, shared/'annotations/hmdb51').equals(t)

# --- generated clips in each official layout

ROWS = [('air drumming','--a_bcdefgh','train'), ('abseiling','0b-_cdefghi','train'), ('hurling (sport)','0c0000000_1','train'),
        ('air drumming','0d0000000_1','val'), ('abseiling','0e0000000_1','val')]
TREES = {'blanks':    [f'{s}/{l}/{i}_000010_000020.mp4' for l,i,s in ROWS],
         'underscores': [f'k400/{s}/{l.replace(" ", "_")}/{i}_000010_000020.mp4' for l,i,s in ROWS],
         'classes':   [f'{l}/{i}_000010_000020.mp4' for l,i,s in ROWS],
         'flat':      [f'{i}_000010_000020.mp4' for l,i,s in ROWS],
         'no zeros':  [f'{s}/{i}_10_20.mkv' for l,i,s in ROWS],
         'bare ids':  [f'{s}/{i}.mp4' for l,i,s in ROWS]}

@pytest.mark.parametrize('tree', TREES)
def test_kinetics_layouts(layout, tree):
    csv = {f'annotations/{s}.csv': KINETICS + ''.join(f'"{l}",{i},10,20,{s},0\n' for l,i,p in ROWS if p==s) for s in ('train','val')}
    root = layout(TREES[tree], csv)
    dls = VideoDataLoaders.from_kinetics(root, **SMALL)
    assert below(root, dls) == [TREES[tree][:3], TREES[tree][3:]] and list(dls.vocab) == ['abseiling','air drumming','hurling (sport)']
    x,y = dls.valid.one_batch()
    assert x.shape == (2,3,4,32,32) and y.tolist() == [1,0]

def test_kinetics_class_folders_without_csv(layout):
    dls = VideoDataLoaders.from_kinetics(layout(TREES['underscores'])/'k400', **SMALL)
    assert list(dls.vocab) == ['abseiling','air drumming','hurling (sport)'] and sizes(dls) == [3,2]

def test_kinetics_missing_share(layout):
    rows = [(f'{"ab"[i%2]} c', f'id{i:09}', 'train' if i < 40 else 'val') for i in range(50)]
    csv = {f'{s}.csv': KINETICS + ''.join(f'{l},{i},0,10,{p},0\n' for l,i,p in rows if p==s) for s in ('train','val')}
    root = layout([f'{i}_000000_000010.mp4' for l,i,s in rows if i not in ('id000000007','id000000013','id000000044')], csv)
    with pytest.raises(FileNotFoundError, match=r'3 of 50 videos \(6.0%\) do not exist, the first is .*id000000007_000000_000010.mp4.*max_missing=0.06'): VideoDataLoaders.from_kinetics(root, **SMALL)
    with pytest.raises(FileNotFoundError, match='6.0%'): VideoDataLoaders.from_kinetics(root, **SMALL, max_missing=.05)
    with pytest.warns(UserWarning, match='3 of 50 videos') as seen: dls = VideoDataLoaders.from_kinetics(root, **SMALL, max_missing=.1)
    assert len(seen) == 1 and sizes(dls) == [38,9] and dls.missing == dict(train=2, valid=1)
    assert dls.summary_table(sample=2).missing.tolist() == [2,1]

def test_kinetics_replacement(layout):
    csv = {'train.csv': KINETICS + 'a,x0000000000,0,10,train,0\nb,y0000000000,0,10,train,0\n', 'val.csv': KINETICS + 'a,z0000000000,0,10,val,0\n'}
    root = layout(['train/a/x0000000000_000000_000010.mp4','train/b/y0000000000_000000_000010.mp4','val/z0000000000_000000_000010.mp4',
                   'replacement/replacement_for_corrupted_k400/x0000000000.mp4'], csv)
    assert kinetics_table(root).path[0] == Path('replacement/replacement_for_corrupted_k400/x0000000000.mp4')
    layout(['other/y0000000000.mp4'])
    with pytest.raises(ValueError, match='two files for one clip, train/b/y.* and other/y'): kinetics_table(root)

@pytest.mark.parametrize('video', ['20bn-something-something-v2/{}.webm', '{}.mp4'])
@pytest.mark.parametrize('note', ['something-something-v2-{}.json', 'labels/{}.json'])
def test_ssv2_layouts(layout, video, note):
    classes = ['Putting something on something', 'Turning something', 'Closing something']   # not in the order of the alphabet
    clip = lambda i,c: dict(id=str(i), template=classes[c].replace('something', '[something]'), label='…', placeholders=['cup'])
    root = layout([video.format(i) for i in range(6)], {note.format('labels'): json.dumps({o:str(i) for i,o in enumerate(classes)}),
                  note.format('train'): json.dumps([clip(i, i%3) for i in range(4)]), note.format('validation'): json.dumps([clip(i, i%3) for i in (4,5)])})
    dls = VideoDataLoaders.from_ssv2(root, **SMALL)
    assert list(dls.vocab) == classes and below(root, dls) == [[video.format(i) for i in o] for o in (range(4), (4,5))] and dls.sampling.mode == 'uniform'
    assert dls.valid.one_batch()[1].tolist() == [1,2]
    def flips(**kw): return [type(o).__name__ for o in VideoDataLoaders.from_ssv2(root, **SMALL, augment='finetune', **kw).train_ds.tfm.transforms].count('HorizontalFlip')
    assert (flips(), flips(flip=True), flips(flip_labels={classes[0]:classes[1]})) == (0,1,1)

@pytest.mark.parametrize('video', ['UCF-101/{c}/v_{c}_{g}_{k}.avi', '{c}/v_{c}_{g}_{k}.avi', 'mp4/v_{c}_{g}_{k}.mp4'])
def test_ucf101_layouts(layout, video):
    names = [(c,f'g{g:02}',f'c{k:02}') for c in ('Archery','YoYo') for g in (1,2,3,4) for k in (1,2)]
    lines = lambda test, n: ''.join(f'{c}/v_{c}_{g}_{k}.avi' + ('' if test else f' {1+(c=="YoYo")}') + '\r\n' for c,g,k in names if (g == f'g0{n}') == test)
    texts = {f'ucfTrainTestlist/{"test" if t else "train"}list0{n}.txt': lines(t, n) for n in (1,2) for t in (True,False)}
    root = layout([video.format(c=c, g=g, k=k) for c,g,k in names], texts | {'ucfTrainTestlist/classInd.txt': '1 Archery\r\n2 YoYo\r\n'})
    for n in 1,2:
        dls = VideoDataLoaders.from_ucf101(root, split=n, **SMALL)
        assert sizes(dls) == [12,4] and {o.group[-3:] for o in dls.valid_ds.items} == {f'g0{n}'} and dls.one_batch()[0].shape == (2,3,4,32,32)
    with warnings.catch_warnings():
        warnings.simplefilter('error')   # no group is on two sides
        dls = VideoDataLoaders.from_ucf101(root, split=1, valid_pct=.3, **SMALL)
    assert sizes(dls) == [8,4,4] and len({o.group for o in dls.valid_ds.items}) == 2

@pytest.mark.parametrize('video', ['videos/{c}/{n}.avi', '{n}.mp4', 'videos/{n}.avi'])
def test_hmdb51_layouts(layout, video):
    names = [(c,f'{film}_{c}_f_cm_np1_fr_med_{i}',flag) for c in ('wave','shake_hands') for film,flag in (('A_FILM!',1), ('B',2), ('wave_films',1)) for i in (0,1)]
    lists = {c:''.join(f'{n}.avi {f*(n[-1]=="0")} \n' for k,n,f in names if k==c) for c in ('wave','shake_hands')}
    root = layout([video.format(c=c, n=n) for c,n,_ in names], {f'testTrainMulti_7030_splits/{c}_test_split2.txt': o for c,o in lists.items()})
    dls = VideoDataLoaders.from_hmdb51(root, split=2, **SMALL)
    assert list(dls.vocab) == ['shake_hands','wave'] and sizes(dls) == [4,2] and dls.one_batch()[0].shape == (2,3,4,32,32)   # those with 0 are in neither
    assert {o.group for o in dls.train_ds.items} == {f'{c}/{f}' for c in dls.vocab for f in ('A_FILM!','wave_films')}

@pytest.mark.parametrize('sep', [' ', ',', '\t'])
def test_lists(layout, sep):
    videos = [f'my videos/v{i} (1).mp4' for i in range(6)]
    text = lambda rows: ''.join(f'{p}{sep}{(i+1)%3}\n' for i,p in rows)
    root = layout(videos, {'lists/train.csv': text(list(enumerate(videos))[:4]), 'lists/val.csv': text(list(enumerate(videos))[4:]), 'names.csv': 'id,name\n0,c\n1,"a"\n2,b\n'})
    dls = VideoDataLoaders.from_lists(root/'lists/train.csv', root/'lists/val.csv', path=root, classes=root/'names.csv', **SMALL)
    assert list(dls.vocab) == ['c','a','b'] and below(root, dls) == [videos[:4], videos[4:]] and dls.valid.one_batch()[1].tolist() == [2,0]
    one = VideoDataLoaders.from_csv(root/'lists/train.csv', root, **SMALL, valid_pct=.4)   # a list is a table too
    assert sizes(one) == [3,1] and list(one.vocab) == ['0','1','2']

# --- bad input: file, line, value, remedy

LISTS = {'classInd.txt': '1 Archery\n2 YoYo\n', 'trainlist01.txt': 'Archery/v_Archery_g02_c01.avi 1\n', 'testlist01.txt': 'Archery/v_Archery_g01_c01.avi\n'}
SSV2 = {'labels.json': '{"Turning something":"0"}', 'train.json': '[{"id":"1","template":"Turning [something]"}]', 'validation.json': '[{"id":"2","template":"Turning [something]"}]'}

@pytest.mark.parametrize('read, texts, error, said', [
    (kinetics_table, {'train.csv': 'a.mp4 0\n'}, ValueError, "train.csv: no column 'youtube_id'.*from_lists"),
    (kinetics_table, {'train.csv': KINETICS+'a,b,1,x1,train,0\n'}, ValueError, "train.csv, line 2: time_end is 'x1', and not a whole number of seconds"),
    (kinetics_table, {'train.csv': KINETICS+'a,b,1,11,train,0\n,c,1,11,train,0\n'}, ValueError, "line 3: label is '', and not a class"),
    (kinetics_table, {'train.csv': KINETICS+'a,b,1,11,train,0\na,b,1,11,train,0\n'}, ValueError, "line 3: 'b_000001_000011' stands in train.csv, line 2 already"),
    (kinetics_table, {'train.csv': KINETICS}, ValueError, 'train.csv: holds no clips'),
    (kinetics_table, {'notes.txt': ''}, FileNotFoundError, r'neither CSV files nor class folders; name the official files with csvs='),
    (ssv2_table, SSV2 | {'labels.json': '["Turning something"'}, ValueError, 'labels.json, line 1: not JSON .*fetch the file again'),
    (ssv2_table, SSV2 | {'labels.json': '{"Turning something":"7"}'}, ValueError, "labels.json: the number of class 'Turning something' is 7"),
    (ssv2_table, SSV2 | {'train.json': '[{"id":"1","template":"Eating [something]"}]'}, ValueError, r"train.json, clip 0 \(id 1\): template 'Eating something' is none of the 1 classes"),
    (ssv2_table, SSV2 | {'train.json': '[{"id":"1"}]'}, ValueError, 'no id or no template'),
    (ssv2_table, SSV2 | {'train.json': '[]'}, ValueError, 'train.json: an empty list'),
    (ssv2_table, {k:v for k,v in SSV2.items() if k != 'validation.json'}, FileNotFoundError, 'no validation.json in it; .*annotations='),
    (ssv2_table, SSV2 | {'old/labels.json': '{}'}, ValueError, 'two files could be labels.json; name the right folder with annotations='),
    (ucf101_table, {k:v for k,v in LISTS.items() if k != 'classInd.txt'}, FileNotFoundError, 'no classInd.txt in it; .*annotations='),
    (ucf101_table, LISTS | {'classInd.txt': '1 Archery\n3 YoYo\n'}, ValueError, "classInd.txt: the number of class 'YoYo' is 3"),
    (ucf101_table, LISTS | {'trainlist01.txt': 'Archery/v_Archery_g02_c01.avi 102\n'}, ValueError, "trainlist01.txt, line 1: class number 102, and classInd.txt says 1 for 'Archery'"),
    (ucf101_table, LISTS | {'testlist01.txt': '\n\nDiving/v_Diving_g01_c01.avi\n'}, ValueError, "testlist01.txt, line 3: class 'Diving' is not in classInd.txt"),
    (ucf101_table, LISTS | {'testlist01.txt': ''}, ValueError, 'testlist01.txt: holds no clips'),
    (lambda p: ucf101_table(p, split=4), LISTS, ValueError, 'split is 4: the official splits are 1, 2 and 3'),
    (lambda p: ucf101_table(p, split=3), LISTS, FileNotFoundError, 'no trainlist03.txt'),
    (hmdb51_table, {'wave_test_split1.txt': 'a.avi 1\n\nb.avi 9\n'}, ValueError, "wave_test_split1.txt, line 3: 'b.avi 9' is not NAME.avi and 0, 1 or 2"),
    (hmdb51_table, {'wave_test_split1.txt': 'a.avi 1\na.avi 2\n'}, ValueError, "line 2: 'a.avi' stands in wave_test_split1.txt, line 1 already"),
    (hmdb51_table, {'wave_test_split1.txt': 'a.avi 1\n', 'jump/b.avi': 'video'}, FileNotFoundError, "videos in folder 'jump' are in none of the 1 lists: fetch jump_test_split1.txt"),
    (lambda p: hmdb51_table(p, split='one'), {}, ValueError, "split is 'one'"),
    (lambda p: VideoDataLoaders.from_lists(p/'l.txt', classes=p/'c.txt'), {'l.txt': 'a.mp4 0\nb c.mp4 2\n', 'c.txt': 'run\nsit\n'}, ValueError, r'l.txt, line 2: class 2, and there are 2 class names: numbers go from 0 to 1'),
    (lambda p: VideoDataLoaders.from_lists(p/'l.txt'), {'l.txt': 'frames/a 120 0\n'}, ValueError, "l.txt, line 1: 'frames/a 120 0' is a folder of frames"),
    (lambda p: VideoDataLoaders.from_lists(p/'l.txt'), {'l.txt': 'a.mp4 120 0\n'}, ValueError, "l.txt, line 1: '120 0' behind the path: one class number is expected"),
    (lambda p: VideoDataLoaders.from_lists(p/'l.txt'), {'l.txt': ''}, ValueError, 'l.txt: holds no clips'),
    (lambda p: VideoDataLoaders.from_lists(p/'l.txt', p/'l.txt', classes=p/'no.txt'), {'l.txt': 'a.mp4 0\n'}, FileNotFoundError, 'no.txt: no such file'),
    (lambda p: VideoDataLoaders.from_csv(p/'l.csv'), {'l.csv': 'a.mp4,run,train\nb.mp4,sit\n'}, ValueError, 'l.csv, line 2: 2 cells in a table of 3 columns'),
])
def test_bad_input(tmp_path, read, texts, error, said):
    for o,text in texts.items():
        (tmp_path/o).parent.mkdir(exist_ok=True)
        (tmp_path/o).write_text(text)
    with pytest.raises(error, match=said): read(tmp_path)

def test_linked_folders_and_hidden_files(layout, tmp_path_factory):
    root = layout(['run/a.mp4','run/._a.mp4','.trash/b.mp4','sit/c.mp4'])
    linked = tmp_path_factory.mktemp('linked')
    (linked/'all').symlink_to(root, target_is_directory=True)
    (linked/'x.csv').write_text(KINETICS + 'run,a,0,10,train,0\n')
    assert str(kinetics_table(linked, linked/'x.csv').path[0]) == 'all/run/a.mp4'
    assert [str(o) for o in folder_table(root).path] == ['run/a.mp4','sit/c.mp4']

# --- classes that do not fit

@pytest.mark.parametrize('model, data, said', [
    (['a','b'], ['a','c'], "1 of the data's classes are not the model's: 'c'; 1 of the model's are not in the data: 'b'"),
    (['a','b','c','d','e'], ['a'], "has 5 classes and the data 1.*4 of the model's are not in the data: 'b', 'c', 'd' and 1 more"),
    (['a','b'], ['b','a'], "the same names in another order: class 0 is 'a' for the model and 'b' in the data"),
])
def test_check_classes(model, data, said):
    with pytest.raises(ValueError, match=said): check_classes(model, data)
    check_classes(model, model); check_classes(None, data)

def test_learners_compare_classes(layout):
    from tsd.evaluate import test_views as evaluate
    from tsd.finetune import finetune_learner
    from tsd.learner import two_stage_learner
    from tsd.student import VideoViT
    dls = VideoDataLoaders.from_folder(layout([f'{c}/{i}.mp4' for c in 'ab' for i in range(3)]), **SMALL, valid_pct=.4)
    def student(vocab):
        model = VideoViT(img_size=32, num_frames=4, embed_dim=48, depth=1, num_heads=3, num_classes=2)
        model.vocab = vocab
        return model
    for vocab,said in ((['b','a'], 'another order'), (['a','c'], "not in the data: 'c'")):
        with pytest.raises(ValueError, match=said): two_stage_learner(dls, student(vocab), distill=None)
        with pytest.raises(ValueError, match=said): finetune_learner(dls, student(vocab))
        with pytest.raises(ValueError, match=said): evaluate(student(vocab), dls.valid_ds.items, 1, 1, dls.sampling, list(dls.vocab), progress=False)
    model = student(['x','y'])
    model.reset_classifier(2)   # a new head has other classes
    learn = two_stage_learner(dls, model, distill=None)
    assert learn.student.vocab == ['a','b'] and finetune_learner(dls, student(['x','y']), reset_head=True).student.vocab == ['a','b']

# --- the card

def test_card(tmp_path, capfd):
    facts = [('train',10,25,(40,48)), ('train',20,25,(40,48)), ('train',60,10,(48,40)), ('test',30,25,(40,48)), ('test',5,10,(40,48))]   # frames, rate, height and width
    rows = []
    for i,(split,n,fps,(h,w)) in enumerate(facts):
        encode(tmp_path/f'{i}.mp4', np.full((n,h,w,3), 40*i, np.uint8), fps=fps)
        rows.append((f'{i}.mp4', 'ab'[i%2], split, ['g0','g0','g1','g2','g3'][i]))
    df = pd.DataFrame(rows + [('gone.mp4','a','train','g9')], columns=['path','label','split','group'])
    with pytest.warns(UserWarning, match='1 of 6 videos'): dls = VideoDataLoaders.from_df(df, tmp_path, **SMALL, max_missing=.2)
    t = dls.summary_table()
    assert list(t.index) == ['train','valid'] and t.clips.tolist() == [3,2] and t.classes.tolist() == [2,2] and t.groups.tolist() == [2,2]
    assert np.allclose(t[['min_s','median_s','max_s']], [[.4,.8,6.], [.5,.85,1.2]]) and np.allclose(t.hours*3600, [7.2,1.7])
    assert t['size'].tolist() == ['48x40','48x40'] and t.fps.iloc[0] == 25 and t.missing.tolist() == [1,0] and t.unreadable.tolist() == [0,0]

def test_card_is_lazy_and_kept(layout, monkeypatch):
    import tsd.data
    asked = []
    root = layout([f'{c}/{i}.mp4' for c in 'ab' for i in range(5)])
    (root/'a/0.mp4').write_bytes(b'not a video')
    monkeypatch.setattr(tsd.data, 'probe', lambda p, f=tsd.data.probe: (asked.append(p), f(p))[1])
    dls = VideoDataLoaders.from_folder(root, **SMALL, valid_pct=.4)
    assert not asked                                                     # making loaders probes nothing
    assert dls.summary_table(sample=0).probed.tolist() == [0,0] and not asked
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        few = dls.summary_table(sample=2)
        assert few.probed.tolist() == [2,2] and len(asked) == 4
        assert dls.summary_table(sample=2).equals(few) and len(asked) == 4   # the same draw, nothing probed twice
    with pytest.warns(UserWarning, match='1 videos cannot be read, the first says: .*a/0.mp4'): t = dls.summary_table()
    assert len(asked) == len(set(asked)) == 10 and t.unreadable.sum() == 1 and t.probed.tolist() == [6,4]
    assert dls.clip_table().seconds.isna().sum() == 1 and len(asked) == 10

def test_figure_of_the_card(layout):
    from tsd.plots import plot_dataset
    dls = VideoDataLoaders.from_folder(layout([f'{c}/{i}.mp4' for c in 'ab' for i in range(5)]), **SMALL, valid_pct=.4)
    axs = plot_dataset(dls)
    assert sum(p.get_width() for p in axs[0].patches if p.get_height()) == 10 and len(axs[1].lines) == 2
    with pytest.raises(ValueError, match='no column'): plot_dataset(dls.clip_table().drop(columns='split'))

def test_shown_through_a_learner(layout, monkeypatch):
    import matplotlib.pyplot as plt
    from fastai.callback.progress import ProgressCallback   # brings learn.no_bar
    from fastai.learner import Learner
    root = layout([f'{c}/{i}.mp4' for c in 'ab' for i in range(5)])
    dls = VideoDataLoaders.from_folder(root, **SMALL, valid_pct=.4)
    plt.close('all')
    learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(24, 2)))
    learn.dls.show_batch(max_n=2)
    assert {o.get_title() for o in plt.gcf().axes} <= {'a','b'} and len(plt.gcf().axes) == 2
    with learn.no_bar(): learn.show_results(max_n=2, shuffle=False)
    assert [o.get_title()[:4] for o in plt.gcf().axes] == ['a → ','a → ']
    plt.close('all')
