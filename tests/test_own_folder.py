"Folders as people have them: each is read as they mean it, or refused with the way out. What is made of theirs has its name."
import io, os, re, struct, subprocess, sys, tarfile, warnings, zipfile, zlib
from pathlib import Path
import numpy as np, pytest, torch
from conftest import LIMIT
from PIL import Image
from bias_distill.data.files import decode
from bias_distill.data.folder import folder, raw_files
from bias_distill.data.layout import layout
from bias_distill.data.listing import SUFFIXES
from bias_distill.data.names import for_figure, for_markdown
from bias_distill.experiment.params import read_params
from bias_distill.experiment.settings import complete
from test_datasets import everything, own, own_cache, picture, put  # own_cache is a fixture
from test_run import job

ROOT = Path(__file__).resolve().parents[1]
ODD = ('$$','US$5_$','a|b','猫','_x*')

def read(data, **kw):
    "The set, and the warnings on the way; nothing is written beside the images."
    before = everything(data)
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        d = folder(data, **kw)
    assert everything(data) == before
    return d, [str(o.message) for o in ws]

def quiet(data, **kw):
    d, ws = read(data, **kw)
    assert ws == []
    return d

def refused(data, *words, **kw):
    with pytest.raises((ValueError, FileNotFoundError)) as e: folder(data, **kw)
    assert not [w for w in words if w not in str(e.value)], str(e.value)

def saved(path, im, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    im.save(path, **kw)
    return path

def drawn(i, side=40): return Image.open(io.BytesIO(picture(i, side)))
def tops(files): return {o.split('/')[0] for o in files}
def sizes(d): return len(d.train), len(d.test)

def parts(root, *names, n=10):
    for k,o in enumerate(names):
        for j,c in enumerate(('cats','dogs')):
            for i in range(n): put(root/o/c/f'{i}.png', picture(1000*k+100*j+i, 40))
    return root

# -- train, val, test

@pytest.mark.parametrize('val', ['val','valid','Validation','dev'])
def test_train_val_test(val, tmp_path):
    d = parts(tmp_path/'d', 'train', val, 'test')
    final, settings = quiet(d), quiet(d, split='validation')
    assert sizes(final) == sizes(settings) == (20,20)
    assert [tops(o) for o in final.files] == [{'train'},{'test'}] and [tops(o) for o in settings.files] == [{'train'},{val}]
    assert "20 of val/ left for split='validation'" in final.source and 'judged by val/' in settings.source

def test_train_and_valid_without_test(tmp_path):
    "A fifth of train judges in the end; val judges settings, and never the result."
    d = parts(tmp_path/'d', 'train', 'valid')
    final, settings = quiet(d), quiet(d, split='validation')
    assert sizes(final) == (16,4) and [tops(o) for o in final.files] == [{'train'}]*2
    assert sizes(settings) == (16,20) and set(settings.files[0]) == set(final.files[0]) and tops(settings.files[1]) == {'valid'}
    assert '4 (1/5) held out for test as there is no test/' in final.source

def test_two_folders_for_one_part(tmp_path): refused(parts(tmp_path/'d', 'train', 'val', 'valid'), 'val/ and valid/', 'which one is meant')

# -- a class that is called train

def test_a_class_called_train(tmp_path):
    d = quiet(own(tmp_path/'d', ('bus','car','train')))
    assert d.classes == ('bus','car','train') and sizes(d) == (48,12)

def test_train_that_may_be_both(tmp_path):
    d = own(own(tmp_path/'d', ('bus','car'))/'train', ('cats','dogs')).parent
    refused(d, 'mixture', 'bus/, car/, train/', 'If train/ is a class', 'if it is a part, move the other folders')
    inside = tmp_path/'e'/'train'                                    # the way out that it names
    own(inside, ('bus','car','train'))
    assert quiet(tmp_path/'e').classes == ('bus','car','train')

# -- formats

@pytest.mark.parametrize('suffix', [o for o in SUFFIXES if o != '.png'])
def test_formats_that_pillow_reads(suffix, tmp_path):
    d = own(tmp_path/'d', n=6)
    for i in range(6): saved(d/'cats'/f'other{i}{suffix.upper()}', drawn(900+i).convert('RGB'))
    s = quiet(d)
    assert sizes(s)[0]+sizes(s)[1] == 24 and sum(o.endswith(suffix.upper()) for o in s.files[0]+s.files[1]) == 6

def test_half_a_class_in_a_format_that_is_not_read(tmp_path):
    d = own(tmp_path/'d', n=6)
    for i in range(6): put(d/'cats'/f'{i}.psd', b'8BPS')
    put(d/'dogs'/'notes.txt', b'x')
    for _ in range(2):                                               # also from the cache
        s, (message,) = read(d)
        assert all(o in message for o in ("class 'cats'", '6 of 12 files', '50%', '.psd 6', '.png'))
        assert '7 other files passed over (cats 6, dogs 1)' in s.source

def test_a_quarter_is_said_and_not_loud(tmp_path):
    d = own(tmp_path/'d', n=6)
    for i in range(2): put(d/'cats'/f'{i}.psd', b'8BPS')
    assert '2 other files passed over (cats 2)' in quiet(d).source

def test_the_first_frame_of_an_animation(tmp_path):
    d = own(tmp_path/'d', n=6)
    frames = [drawn(i, 32).convert('RGB').quantize() for i in (50, 51, 52)]
    name = saved(d/'cats'/'film.gif', frames[0], save_all=True, append_images=frames[1:])
    saved(d/'cats'/'still.gif', frames[0])
    s = quiet(d)
    x = {o: x for part,files in zip((s.train, s.test), s.files) for o,x in zip(files, part.x)}
    assert torch.equal(x['cats/film.gif'], x['cats/still.gif']) and torch.equal(x['cats/film.gif'], torch.from_numpy(decode(name.read_bytes(), 32, '')))
    assert s.source.count('of 1 with several frames the first') == 1

def deep(root, top):
    for k,c in enumerate(('cats','dogs')):
        for i in range(6):
            x = np.random.default_rng(10*k+i).integers(0, top, (40,40))
            x[0,0] = top
            saved(root/c/f'{i}.{"png" if i else "tif"}', Image.fromarray(x.astype(np.uint16)))
    return root

@pytest.mark.parametrize('top,bits', [(4000,12),(1023,10),(255,8)])
def test_sixteen_bits_of_which_fewer_are_in_use(top, bits, tmp_path):
    s = quiet(deep(tmp_path/'d', top))
    mean = torch.cat([s.train.x, s.test.x]).float().mean().item()
    assert abs(mean - top/2*255/(2**bits-1)) < 3 and f'12 of 16 bits stretched by the {bits} in use' in s.source

def test_sixteen_bits_in_use_are_not_stretched(tmp_path):
    s = quiet(deep(tmp_path/'d', 65535))
    assert abs(torch.cat([s.train.x, s.test.x]).float().mean().item()-127.5) < 3 and 'stretched' not in s.source

def test_one_dark_picture_stays_dark_among_others(tmp_path):
    "What is in use is told over the set: a picture of 12 bits beside one of 16."
    d = deep(tmp_path/'d', 65535)
    saved(d/'cats'/'dark.png', Image.fromarray(np.full((40,40), 4000, np.uint16)))
    s = quiet(d)
    dark = next(x for part,files in zip((s.train, s.test), s.files) for o,x in zip(files, part.x) if 'dark' in o)
    assert (dark == round(4000/257)).all()

def colour_png(top):
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
    row = b'\0' + struct.pack('>H', top)*120
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 40, 40, 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(row*40)) + chunk(b'IEND', b'')

def test_colour_of_sixteen_bits(tmp_path):
    d = own(tmp_path/'d', n=6)
    put(d/'cats'/'deep.png', colour_png(4000))
    refused(d, '1 pictures in colour have 16 bits a channel, of which 12 are in use', 'Save them with 8 bits')
    put(d/'cats'/'deep.png', colour_png(65535))
    assert len(quiet(d).train)

def test_floating_point_pictures(tmp_path):
    d = own(tmp_path/'d', n=6)
    saved(d/'cats'/'f.tif', Image.new('F', (40,40), .5))
    refused(d, 'cats/f.tif', 'floating-point', '8 or 16 bits')

# -- size

def test_a_healthy_picture_above_the_limit(tmp_path, monkeypatch):
    d = own(tmp_path/'d', n=6)
    saved(d/'cats'/'map.png', Image.new('1', (20_000,10_000)))
    refused(d, 'cats/map.png', '20,000 x 10,000', '200 megapixels', 'the limit is 180', 'BIAS_DISTILL_MEGAPIXELS=200')
    saved(d/'cats'/'map.png', Image.new('1', (400,300)))
    monkeypatch.setenv('BIAS_DISTILL_MEGAPIXELS', '.1')
    refused(d, 'the limit is 0.1')
    monkeypatch.setenv('BIAS_DISTILL_MEGAPIXELS', '.12')
    assert len(quiet(d).train)
    monkeypatch.setenv('BIAS_DISTILL_MEGAPIXELS', 'many')
    refused(d, "BIAS_DISTILL_MEGAPIXELS='many'", 'a number of megapixels')

def test_a_large_picture_below_the_limit(tmp_path):
    "Pillow alone would warn of a decompression bomb."
    d = own(tmp_path/'d', n=6)
    saved(d/'cats'/'map.png', Image.new('1', (12_000,9_000)))
    assert len(quiet(d).train) and Image.MAX_IMAGE_PIXELS < 1e8

# -- names

def test_one_class_in_two_ways_of_unicode(tmp_path):
    d = tmp_path/'d'
    own(d/'train', ('caf\u00e9','bar'))
    for k,c in enumerate(('cafe\u0301','bar')):
        for i in range(5): put(d/'test'/c/f'{i}.png', picture(500+10*k+i, 40))
    s = quiet(d)
    assert s.classes == ('bar','caf\u00e9') and sizes(s) == (40,10) and s.test.y.bincount().tolist() == [5,5]
    assert all((d/o).is_file() for o in s.files[1])                  # as they are called on disk

def test_odd_names_in_tables_and_figures(tmp_path):
    import matplotlib.pyplot as plt
    from bias_distill.data.split import show_grid
    from bias_distill.networks.testing import plot_groups
    from bias_distill.results.figures import strip
    from bias_distill.results.tables import files_table, group_table
    from bias_distill.weights.report import file_weights, show_weighted
    from bias_distill.weights.weighting import fixed
    s = quiet(own(tmp_path/'d', ODD, n=6))
    w = fixed('mine', torch.arange(1., len(s.train)+1))
    x = torch.stack([s.train.x[s.train.y==k][:2] for k in range(5)])
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'Glyph')                    # that a font has not
        axes = [show_grid(x, titles=s.classes), show_weighted(w, s.train, s.classes, 2), plot_groups({o: dict(accuracy=[1.,2.]) for o in s.classes})]
        figures = [ax.figure for ax in axes] + [strip({o: x for o in s.classes}, 2, False)]
        for fig in figures:
            fig.savefig(io.BytesIO(), format='png')
            plt.close(fig)
    assert [o.get_text() for o in axes[0].get_yticklabels()] == [for_figure(o) for o in s.classes]
    for text in (files_table(file_weights(w, s)), group_table([dict(weighting='kde', distiller='dm', groups={o: [1.,2.] for o in ODD})])):
        assert len({line.replace(r'\|', '').count('|') for line in text.splitlines()}) == 1 and for_markdown('US$5_$') in text

def test_a_name_that_is_no_unicode(tmp_path):
    d = own(tmp_path/'d', n=6)
    os.rename(d/'cats', os.fsencode(d)+b'/caf\xe9')
    s = quiet(d)
    from bias_distill.data.kept import write_table
    from bias_distill.weights.report import file_weights
    from bias_distill.weights.weighting import uniform
    write_table(tmp_path/'t.csv', file_weights(uniform(), s))
    assert b'caf\xe9/0.png' in (tmp_path/'t.csv').read_bytes() and len(dict(raw_files(d))) == 18 and for_markdown(s.classes[0]) == r'caf\\udce9'

# -- litter

def test_litter_is_left_out_and_said(tmp_path):
    d = own(tmp_path/'d')
    good = quiet(d)
    for o in ('__MACOSX/cats/._0.png','cats/Thumbs.db','.DS_Store','dogs/desktop.ini'): put(d/o, b'x')
    put(d/'.ipynb_checkpoints'/'0-checkpoint.png', picture(1, 40))
    put(d/'cats'/'.ipynb_checkpoints'/'0-checkpoint.png', picture(1, 40))
    (d/'runs'/'stages').mkdir(parents=True)
    s = quiet(d)
    assert s.fingerprint == good.fingerprint and 'litter left out (.DS_Store, .ipynb_checkpoints, Thumbs.db, __MACOSX, desktop.ini, runs)' in s.source

def test_an_empty_folder_is_named_with_the_way_out(tmp_path):
    d = own(tmp_path/'d')
    (d/'bats').mkdir()
    refused(d, "class 'bats' has no image", 'put images there, or delete the folder')
    put(d/'bats'/'a.psd', b'x')
    refused(d, "class 'bats' has no image", '1 other files', 'move the folder elsewhere')

# -- archives

def zipped(path, root, inside=''):
    with zipfile.ZipFile(path, 'w') as z:
        for o in sorted(root.rglob('*')): z.write(o, inside+o.relative_to(root).as_posix())
    return path

def test_a_zip_is_the_same_set(tmp_path):
    d = parts(tmp_path/'d', 'train', 'val', 'test')
    good = quiet(d, split='validation')
    for inside in ('', 'pets/'):
        s = quiet(zipped(tmp_path/'d.zip', d, inside), split='validation')
        assert s.fingerprint == good.fingerprint and s.files == tuple(tuple(inside+o for o in part) for part in good.files)
    assert {o.removeprefix('pets/'): raw for o,raw in raw_files(tmp_path/'d.zip')} == dict(raw_files(d))

def test_a_zip_of_a_mac_and_one_with_backslashes(tmp_path):
    d = own(tmp_path/'d', n=6)
    good = quiet(d)
    for name,sign in (('mac.zip','/'), ('windows.zip','\\')):
        with zipfile.ZipFile(tmp_path/name, 'w') as z:
            for o in sorted(d.rglob('*.png')): z.writestr(zipfile.ZipInfo(o.relative_to(tmp_path).as_posix()), o.read_bytes())
            z.writestr('__MACOSX/d/cats/._0.png', b'x')
        if sign == '\\': (tmp_path/name).write_bytes((tmp_path/name).read_bytes().replace(b'd/cats/', b'd\\cats\\').replace(b'd/dogs/', b'd\\dogs\\').replace(b'd/owls/', b'd\\owls\\'))
        s = quiet(tmp_path/name)
        assert s.fingerprint == good.fingerprint and '__MACOSX' in s.source

def test_bad_zips(tmp_path):
    z = zipped(tmp_path/'d.zip', own(tmp_path/'d', n=6))
    whole = z.read_bytes()
    z.write_bytes(whole[:-40])
    refused(z, 'd.zip', 'whole zip archive', 'cut or damaged')
    z.write_bytes(whole[:300]+bytes([whole[300]^255])+whole[301:])
    refused(z, 'd.zip')
    for name in ('../evil.png','/evil.png'):
        with zipfile.ZipFile(z, 'w') as f: f.writestr(name, b'1')
        refused(z, 'would leave its folder', 'evil')
    link = zipfile.ZipInfo('cats/link.png')
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(z, 'w') as f: f.writestr(link, '/etc/hostname')
    refused(z, "entry 'cats/link.png' is a link", 'unpack your own, and name its folder')

def test_a_tar_with_a_link(tmp_path):
    d = own(tmp_path/'d', n=6)
    (d/'cats'/'again.png').symlink_to('0.png')
    with tarfile.open(tmp_path/'d.tar', 'w') as t: t.add(d, 'd')
    refused(tmp_path/'d.tar', "entry 'd/cats/again.png' is a link", 'unpack your own, and name its folder')
    assert len(read(d)[0].train)                                     # the folder is read, with its copy

def test_links_to_what_is_gone(tmp_path):
    "A class, in a folder of classes or in train/, or a picture; not a hidden file, such as an editor's lock."
    d = own(tmp_path/'d'/'train', n=6)
    for name in ('birds','birds.png','cats/gone.png'):
        (d/name).symlink_to('/mnt/gone/birds')
        for data in (d, d.parent): refused(data, f"{d/name}: a link to '/mnt/gone/birds', which is not there")
        (d/name).unlink()
    (d/'cats'/'.#0.png').symlink_to('me@here.1')
    assert len(folder(d).train)

def test_a_folder_in_a_folder_of_the_same_name(tmp_path):
    d = own(tmp_path/'pictures'/'pictures', n=6)
    refused(d.parent, 'pictures/cats/', 'lies deeper', f'All images lie in pictures/: name {d}')
    assert len(quiet(d).train)

def test_settings_of_the_wrong_kind(tmp_path):
    d = own(tmp_path/'d', n=6)
    refused(d, 'size=32.0: expected 28, 32 or 64 pixels, an int', size=32.)
    assert len(quiet(d, size=np.int64(32)).train)
    for f in (folder, layout):
        for bad in (2024, 0, b'd', ['d']):
            with pytest.raises(TypeError, match=re.escape(f'data_dir={bad!r}: expected a path, as a str or a Path, got {type(bad).__name__}')): f(data_dir=bad)
    with pytest.raises(FileNotFoundError, match='`-p dataset folder` reads a folder a class'): layout(data_dir=d)

def test_a_pipe_among_the_images(tmp_path):
    d = own(tmp_path/'d', n=6)
    os.mkfifo(d/'cats'/'z.png')
    refused(d, 'cats/z.png', 'found a pipe')

# -- what was fine, and stays so

def test_inks_broken_notes_and_links_in_circles(tmp_path):
    d = own(tmp_path/'d', n=6)
    im = drawn(905).convert('RGB')
    for i,note in enumerate((b'', b'nonsense', b'II*\0\x08\0\0\0\xff\xff', b'MM\0*\xff\xff\xff\xff')): saved(d/'cats'/f'note{i}.jpg', im, exif=b'Exif\0\0'+note, quality=95)
    inks = saved(d/'cats'/'inks.jpg', im.convert('CMYK'), quality=95).read_bytes()
    at = inks.index(b'\xff\xee')
    put(d/'cats'/'unmarked.jpg', inks[:at]+inks[at+2+int.from_bytes(inks[at+2:at+4], 'big'):])
    (d/'cats'/'round').symlink_to(d/'cats')
    with pytest.raises(ValueError, match='lies deeper'): folder(d)    # images behind the link: which folder is their class?
    (d/'cats'/'round').unlink()
    s, ws = read(d)
    assert all('pixel for pixel' in o for o in ws)                   # these are copies; no word of broken notes
    x = {o: x.float() for part,files in zip((s.train, s.test), s.files) for o,x in zip(files, part.x)}
    plain = torch.from_numpy(decode((d/'cats'/'note0.jpg').read_bytes(), 32, '')).float()
    for name in ('note1','note2','note3','inks','unmarked'): assert (x[f'cats/{name}.jpg']-plain).abs().mean() < 6, name

def test_sixty_classes_of_three(tmp_path): assert sizes(quiet(own(tmp_path/'d', [f'c{i:02}' for i in range(60)], 3))) == (120,60)

def test_two_images_against_many(tmp_path):
    d = own(own(tmp_path/'d', ('many','more'), 60), ('few',), 2)
    with pytest.raises(ValueError) as e: job(complete(profile='smoke', dataset='folder', ipc=2), data_dir=str(d), out_dir=str(tmp_path/'runs'))
    assert all(o in str(e.value) for o in ('ipc=2', "'few'", '1 images to train with', '1 that judge')), str(e.value)

# -- parameters and the compiler

@pytest.mark.parametrize('given,words', [(2024, ['data_dir=2024','got int','./2024','-r data_dir 2024']), (1e5, ['data_dir=100000.0','./NAME','-r data_dir NAME']),
                                         (float('nan'), ['data_dir=nan','1e5, nan','-r data_dir NAME']), (True, ['data_dir=True','-r data_dir NAME'])])
def test_folders_that_look_like_numbers(given, words):
    with pytest.raises(ValueError) as e: read_params(dict(profile='smoke', dataset='folder', data_dir=given))
    assert not [w for w in words if w not in str(e.value)], str(e.value)
    assert read_params(dict(profile='smoke', dataset='folder', data_dir='2024'))['data_dir'] == '2024'

@pytest.mark.compiled
def test_a_compiler_that_fails():
    code = "import torch; from bias_distill.networks.fast import compiled; f = compiled(torch.sin); assert f is torch.sin and compiled(torch.cos) is torch.cos"
    p = subprocess.run([sys.executable,'-c',code], cwd=ROOT, env=os.environ | dict(CXX='/bin/false'), capture_output=True, text=True, timeout=LIMIT)
    assert p.returncode == 0, p.stderr
    assert p.stderr.count('UserWarning') == 1 and '/bin/false' in p.stderr and 'without torch.compile' in p.stderr
