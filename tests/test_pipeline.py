"The command line from clips to run folder, on generated and on real clips, and what it says of bad input."
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

INTERFACE = dict(
    mhca='head_centres patch_positions dense_bias fold_bias MHCA', student='VideoViT', aligner='Aligner fad_loss', fpld='fpld_loss FPLDBranches',
    distill='kd_loss stage_loss Distill', teachers='prepare_teacher load_teacher', sampling='dense_indices uniform_indices view_indices',
    video='probe decode check VideoError VideoInfo Check', augment='MultiScaleCrop VideoMixup three_crops', data='VideoDataLoaders',
    tinyclips='make_tinyclips', schedule='Stage TwoStage', learner='two_stage_learner', finetune='finetune_learner', evaluate='test_views predict',
    checkpoints='save_student load_student', plots='plot_history plot_results', paper='paper_tables RECIPE ledger',
    annotations='read_annotations check_classes', doctor='doctor prepare_data', frames='FrameCache', resume='ExactResume', cache='TeacherCache Views cache_bytes',
    training='Precision Accumulate EMA FiniteLoss', predict='sliding_probs rollout', analysis='compare cka', bench='bench compare', train='read_config plan run_recipe',
    distributed='Distributed', export='export_student export_onnx fold_constants', cost='cost plot_cost', shards='write_shards index_shards', serve='prediction_page serve')
TINY = ('--frames 4 --embed-dim 48 --num-heads 3 --cnn-epochs 1 --vit-epochs 1 --stage1-epochs 1 --stage2-epochs 1 --finetune-epochs 1 --bs 10 --clips 2').split()
SMALL = '--teacher-clips 40 --student-clips 20 --test-clips 20'.split()

@pytest.mark.parametrize('module', INTERFACE)
def test_interface_names(module):
    mod = importlib.import_module(f'tsd.{module}')
    for name in INTERFACE[module].split(): assert hasattr(mod, name), f'tsd.{module} lacks {name}'

def test_star_import_brings_the_interface():
    scope = {}
    exec('from tsd.all import *', scope)
    for name in 'VideoDataLoaders prepare_teacher load_teacher two_stage_learner finetune_learner predict test_views MHCA Learner'.split(): assert name in scope, name

@pytest.mark.parametrize('variant', [['--distill', 'fad'], ['--distill', 'fpld', '--kind', 'motion']])
def test_demo_fills_a_run_folder(tmp_path, tsd, variant):
    code, out, err = tsd('demo', *TINY, *SMALL, *variant, '--out', 'run')
    assert code == 0, err
    assert 'student after fine-tuning' in out
    run = tmp_path/'run'
    res = pd.read_csv(run/'results.csv')
    assert len(res) == 6 and res.top1.between(0, 1).all() and (res.n == 20).all() and (res.expected == 20).all()
    assert json.loads((run/'config.json').read_text())['distill'] == variant[1]
    assert {'torch', 'timm', 'commit', 'command'} <= set(json.loads((run/'versions.json').read_text()))
    stages = list(pd.read_csv(run/'history.csv').stage.unique())
    assert stages == ['stage1', 'stage2', 'finetune']
    for f in ('history.png', 'results.png'): assert (run/f).read_bytes()[:4] == b'\x89PNG'
    from tsd.checkpoints import load_student
    student, about = load_student(run/'student.safetensors')
    assert len(about['vocab']) == student.num_classes
    assert not [k for k in student.state_dict() if 'aligner' in k or 'branch' in k or 'teacher' in k]

def test_demo_on_real_clips(tmp_path, tsd, shared):
    df = pd.read_csv(shared/'clips'/'ucf5'/'clips.csv')
    few = pd.concat([g.drop_duplicates('group').groupby('label').head(n) for (_, g), n in zip(df.groupby('split'), (4, 10))])   # a clip a recording
    few.assign(path=[str(shared.resolve()/'clips'/'ucf5'/p) for p in few.path]).to_csv(tmp_path/'few.csv', index=False)
    weights = shared/'weights'/'mobilenetv2_100.tf_in1k.safetensors'
    code, out, err = tsd('demo', '--data', 'few.csv', '--cnn', 'mobilenetv2_100', '--cnn-weights', weights.resolve(), '--cnn-options', 'pad_type=same mean=0.5 std=0.5',
               *TINY, '--bs', 5, '--views', 1)
    assert code == 0, err
    res = pd.read_csv(tmp_path/'runs'/'demo'/'results.csv')
    assert (res.n == 20).all() and res.top1[0] > .3        # five classes: features of ImageNet are worth something

@pytest.mark.parametrize('words, said', [
    (['--data', 'absent.csv'], 'absent.csv'), (['--data', 'empty.csv'], 'empty.csv'), (['--data', 'unknown.csv'], 'dog'), (['--data', 'one.csv'], 'only one class'),
    (['--data', 'broken.csv'], 'broken.mp4: cannot be read'), (['--size', '30'], '= 30'), (['--cnn', 'resnet1O1'], 'resnet101'),
    (['--cnn', 'resnet18', '--cnn-weights', 'absent.pth'], 'absent.pth'), (['--cnn-weights', 'absent.pth'], '--cnn'), (['--kind', 'sport'], 'sport'), (['--embed-dim', '50'], 'embed_dim = 50')])
def test_bad_input_is_one_clear_line(tmp_path, tsd, words, said):
    (tmp_path/'empty.csv').write_text('path,label,split\n')
    for i in range(4): (tmp_path/f'broken{i or ""}.mp4').write_bytes(b'not a video')
    row = 'broken{}.mp4,{},{}\n'.format
    (tmp_path/'unknown.csv').write_text('path,label,split\n' + row('', 'cat', 'train') + row(1, 'cow', 'train') + row(2, 'dog', 'test'))
    (tmp_path/'one.csv').write_text('path,label,split\n' + row('', 'cat', 'train') + row(1, 'cat', 'train') + row(2, 'cat', 'test'))
    (tmp_path/'broken.csv').write_text('path,label,split\n' + row('', 'cat', 'train') + row(1, 'cow', 'train') + row(2, 'cow', 'test'))
    code, out, err = tsd('demo', *SMALL, *words, '--bs', 2)
    assert code == 1 and said in err and 'Traceback' not in err, err

def test_the_command_itself(tmp_path):
    "Installed, and in a process of its own"
    def run(*words): return subprocess.run([Path(sys.executable).with_name('tsd'), *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    done = run('demo', '--data', 'absent.csv')
    assert done.returncode == 1 and 'absent.csv' in done.stderr and 'Traceback' not in done.stderr
    done = run('--help')
    assert done.returncode == 0 and all(c in done.stdout for c in ('demo', 'study', 'prepare-teacher'))

def test_traceback_where_it_is_asked_for(tsd):
    with pytest.raises(FileNotFoundError, match='absent.csv'): tsd('--traceback', 'demo', '--data', 'absent.csv')

def test_prepared_teacher_of_real_clips(tmp_path, tsd, shared):
    weights = (shared/'weights'/'mobilenetv2_100.tf_in1k.safetensors').resolve()
    words = ['prepare-teacher', '--data', (shared/'clips'/'ucf5'/'clips.csv').resolve(), '--model', 'mobilenetv2_100', '--weights', weights, '--frames', 1, '--size', 96, '--bs', 16,
             '--model-options', 'pad_type=same mean=0.5 std=0.5', '--out', 'teachers']
    code, first, err = tsd(*words)
    assert code == 0, err
    code, second, err = tsd(*words)
    assert code == 0 and second == first.replace('kept in', 'read from'), err
    from tsd.teachers import load_teacher
    teacher = load_teacher(*(tmp_path/'teachers').iterdir())
    assert teacher.num_classes == 5 and teacher.top1 > .35 and f'{teacher.top1:.1%}' in first
