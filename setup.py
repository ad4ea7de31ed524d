"All metadata lives in settings.ini; this file only hands it to setuptools."
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
extras = {o: shlex.split(cfg[f'{o}_requirements']) for o in ('export', 'serve', 'shards')}
extras['dev'] = sum(extras.values(), shlex.split(cfg['dev_requirements']))

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0', url=cfg['git_url'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['tsd', 'tsd.*']), include_package_data=True, zip_safe=False,
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg['requirements']),
    extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Programming Language :: Python :: 3',
                 'License :: OSI Approved :: Apache Software License', 'Operating System :: OS Independent'],
)
