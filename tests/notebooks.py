"""Tools for the notebooks: `run` re-executes and cleans them, `readme` renders README.md, `test` and `check` prove that they pass and that the tree is in step.

    python tests/notebooks.py run nbs/01_mhca.ipynb …   # execute in place, keep outputs, clean
    python tests/notebooks.py readme                    # README.md from nbs/index.ipynb
    python tests/notebooks.py test                      # `nbdev_test` of every notebook, each in a process of its own, as many at once as there are cores
    python tests/notebooks.py check                     # clean, exported, README current; exits 1 and names what is not
"""
import filecmp, os, re, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.export import nb_export
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor
from fastcore.xtras import working_directory

ROOT = Path(__file__).resolve().parent.parent
NBS  = ROOT/'nbs'
HAND_WRITTEN = {'__init__.py', 'all.py', 'imports.py', '_modidx.py'}

def notebooks(root=ROOT):
    "Every notebook of the project under `root`, sorted; an empty list is an error"
    nbs = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    if not nbs: raise SystemExit(f'no notebook found under {root/"nbs"}')
    return nbs

def shown(outputs):
    "The outputs without stderr, and without what progress bars wrote over"
    outputs = [o | dict(text=re.sub(r'.*\r', '', ''.join(o['text'])).splitlines(keepends=True)) if 'text' in o else o for o in outputs if o.get('name') != 'stderr']
    return [o for o in outputs if o.get('text', True)]

def run(path):
    "Execute the notebook at `path` as `nbdev_test` would, but keep the outputs; cells with a test flag keep their old ones"
    path, skip = Path(path).resolve(), set(get_config().tst_flags.split())
    os.environ['IN_TEST'] = '1'
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    def skipped(cell):
        if cell.cell_type != 'code': return True
        d = getattr(cell, 'directives_', {}) or {}
        if d.get('eval:', [''])[0].lower() == 'false' or skip & d.keys(): return True
        cell.outputs = []
    shell = CaptureShell(path, mpl_format='png')
    try:
        with working_directory(path.parent): shell.run_all(nb, exc_stop=True, preproc=skipped)
    except Exception: raise SystemExit(shell.prettytb(fname=path.name))
    raw = read_nb(path)                                   # the source as it stands on disk, directives included
    for old, new in zip(raw.cells, nb.cells):
        if old.cell_type == 'code': old['outputs'] = shown(new.get('outputs', []))
    clean_nb(raw)
    write_nb(raw, path)

def render_readme(path=NBS/'index.ipynb'):
    "Markdown of the index notebook: prose, shown code, text and table outputs; hidden cells left out, links made right for the top folder"
    keep = []
    for c in read_nb(path).cells:
        flags = re.findall(r'^#\|\s*(.+?)\s*$', c.source, re.M)
        if 'hide' in flags: continue
        if c.cell_type == 'markdown': keep.append(re.sub(r'\]\(([\w/]+\.ipynb)\)', r'](nbs/\1)', c.source))
        else:
            code = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
            if 'echo: false' not in flags: keep.append(f'```python\n{code}\n```')
            for o in c.get('outputs', []):
                data = o.get('data', {})
                text = ''.join(data.get('text/markdown', [])) or '```\n' + ''.join(data.get('text/plain', o.get('text', []))).strip() + '\n```'
                keep.append(text)
    note = '<!-- Rendered from nbs/index.ipynb by `python tests/notebooks.py readme`: edit the notebook. -->'
    return '\n\n'.join([note, *(o.strip() for o in keep)]) + '\n'

def out_of_step():
    "What is not in step in the working tree, a line each: dirty notebooks, stale or orphaned modules, an old README"
    bad = []
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'tsd'
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '.venv', 'runs', '__pycache__', '*.egg-info'))
        bins = Path(sys.executable).parent
        for tool in ('nbdev_clean', 'nbdev_export'): subprocess.run([bins/tool], cwd=copy, check=True, capture_output=True)
        for nb in notebooks():
            rel = nb.relative_to(ROOT)
            if not filecmp.cmp(nb, copy/rel, shallow=False): bad.append(f'{rel} is not clean: run nbdev_clean')
        fresh = {p.name for p in (copy/'tsd').glob('*.py')}
        for p in sorted((copy/'tsd').glob('*.py')):
            mine = ROOT/'tsd'/p.name
            if not mine.exists() or not filecmp.cmp(mine, p, shallow=False): bad.append(f'tsd/{p.name} differs from its notebook: run nbdev_export')
        stems = {'_'.join(nb.stem.split('_')[1:]) for nb in notebooks()}
        for name in sorted(fresh - HAND_WRITTEN):
            if Path(name).stem not in stems: bad.append(f'tsd/{name} has no notebook')
    if (ROOT/'README.md').read_text(encoding='utf-8') != render_readme(): bad.append('README.md is old: run python tests/notebooks.py readme')
    return bad

def test(path):
    "Run `nbdev_test` on one notebook; True where it passed. One process each: patches that one notebook's imports make do not reach the next"
    cmd,start = [Path(sys.executable).parent/'nbdev_test', '--path', str(path.relative_to(ROOT)), '--n_workers', '0'],time.time()
    try: done = subprocess.run(cmd, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    except subprocess.TimeoutExpired: print(f'FAILED {path.name}: not done after 600 s', flush=True); return False
    ok = done.returncode == 0 and 'Success.' in done.stdout
    print(f'{"passed" if ok else "FAILED"} {path.name} ({time.time()-start:.0f} s)' + ('' if ok else '\n' + done.stdout + done.stderr), flush=True)
    return ok
test.__test__ = False

if __name__ == '__main__':
    os.chdir(ROOT)
    cmd, *args = sys.argv[1:] or ['']
    if cmd == 'run':
        for a in args:
            subprocess.run([sys.executable, __file__, '_run', a], check=True) if len(args) > 1 else run(a)
            print('ran', a)
    elif cmd == '_run': run(*args)
    elif cmd == 'test':
        with ThreadPoolExecutor(os.cpu_count()) as pool: passed = list(pool.map(test, notebooks()))
        print(f'notebooks: {sum(passed)} passed, {len(passed)-sum(passed)} failed')
        sys.exit(not all(passed))
    elif cmd == 'readme': (ROOT/'README.md').write_text(render_readme(), encoding='utf-8')
    elif cmd == 'check':
        bad = out_of_step()
        print('\n'.join(bad) or f'in step: {len(notebooks())} notebooks clean, exported, README current')
        sys.exit(bool(bad))
    else: sys.exit(__doc__)
