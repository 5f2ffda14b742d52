//! Old bytes are read as what they meant, and written again as they were. Each vector has damaged twins, which must be
//! refused, each for its reason.
//!
//! `EPOCHFS_BLESS=1` writes the files that are missing. It never changes one: a vector that no longer fits means that
//! old repositories no longer fit.

mod vectors;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use epochfs_format::{
    Block, BlockKind, Body, Commit, EntryKind, FANOUT, FORMAT_VERSION, FooterBuilder, HEADER_LEN, Image, Manifest,
    ManifestEntry, ManifestPlace, NodeEditor, ObjectRef, Root, StoredNode, TRAILER_LEN, Trailer, decode_node,
    levels_for,
};
use vectors::{Seal, Target, kind_of, objects, seal_block, targets};

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// The committed file; where there is none, it is written if that is asked for.
fn stored(name: &str, fresh: &dyn Fn() -> Vec<u8>) -> Vec<u8> {
    // One test at a time: another one reads no file that is half written.
    static WRITING: Mutex<()> = Mutex::new(());
    let _guard = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let path = directory().join(name);
    if !path.exists() && std::env::var_os("EPOCHFS_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::File::create_new(&path).unwrap().write_all(&fresh()).unwrap();
    }
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}; EPOCHFS_BLESS=1 writes it", path.display()))
}

#[test]
fn vectors_are_read_as_what_they_mean_and_written_as_they_are() {
    for target in targets() {
        let name = target.name;
        let bytes = stored(&target.file(), &|| target.bytes.clone());
        let value = (target.decode)(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(
            value.view() == target.expected,
            "{name} is read as\n{}\nand not as\n{}",
            value.view(),
            target.expected
        );
        if target.canonical {
            assert!(target.bytes == bytes, "{name}: the value built in code is written in other bytes");
            assert!(value.again().unwrap() == bytes, "{name}: what was read is written in other bytes");
        }
    }
}

#[test]
fn objects_are_read_as_what_they_mean() {
    let names = [vectors::pack(), vectors::record_object()];
    for (target, object) in objects().into_iter().zip(names) {
        let name = target.name;
        let bytes = stored(&target.file(), &|| target.bytes.clone());
        (target.decode)(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        let trailer = Trailer::decode(&bytes, bytes.len() as u64).unwrap();
        let footer = trailer.decode_footer(&bytes[trailer.footer_offset as usize..bytes.len() - TRAILER_LEN]).unwrap();
        let mut blocks = Vec::new();
        for entry in footer.iter() {
            let block = &bytes[entry.offset as usize..(entry.offset + entry.len) as usize];
            blocks.push((entry.kind, entry.hash, block.to_vec()));
        }
        assert!(vectors::object(&object, &blocks) == bytes, "{name} is written in other bytes around its blocks");

        let mut expected = vectors::blocks();
        if name == "record-object" {
            let (offset, len) = (trailer.record_offset as usize, trailer.record_len as usize);
            let all = targets();
            let golden = all.iter().find(|target| target.name == "record-commit-inline").unwrap();
            let record = stored(&golden.file(), &|| golden.bytes.clone());
            assert!(bytes[offset..][..len] == record, "{name}: its record is not the golden one");
            expected.push((BlockKind::Record, [0; 32], record));
        }
        let what = |blocks: &[(BlockKind, [u8; 32], Vec<u8>)]| -> Vec<_> {
            blocks.iter().map(|(kind, hash, _)| (*kind, *hash)).collect()
        };
        assert_eq!(what(&blocks), what(&expected), "{name}");
        for ((kind, hash, block), (_, _, fresh)) in blocks.iter().zip(&expected) {
            if *kind != BlockKind::Page {
                assert!(block == fresh, "{name}: a block of kind {kind:?} is written in other bytes");
            }
            if *kind == BlockKind::Node {
                let StoredNode::Whole(node) = decode_node(block, &object).unwrap() else { panic!("it is whole") };
                assert_eq!(node.digest(), *hash);
                // References to its own object follow the object, whatever its name.
                assert_eq!(node.objects(), std::slice::from_ref(&object));
            }
        }
    }
}

type Damage = fn(&[u8]) -> Vec<u8>;

/// Where the golden heartbeat says what the host is there for: behind magic, version, repository, host, number, name and
/// location. The features' count is 34 bytes behind it.
const HEARTBEAT_PURPOSE: usize = 8 + 2 + 16 + 16 + 8 + 12 + 12;

/// The body edited, with a checksum that fits.
fn resealed(seal: Seal, bytes: &[u8], edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut body = seal.open(bytes);
    edit(&mut body);
    seal.close(&body)
}

fn replaced(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    assert!(text.contains(from), "{from}");
    Seal::Text.close(text.replace(from, to).as_bytes())
}

fn with_trailer(bytes: &[u8], edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let (front, trailer) = bytes.split_at(bytes.len() - TRAILER_LEN);
    [front, &resealed(Seal::Behind, trailer, edit)].concat()
}

fn with_footer(bytes: &[u8], edit: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let trailer = Trailer::decode(bytes, bytes.len() as u64).unwrap();
    let (front, footer) = bytes[..bytes.len() - TRAILER_LEN].split_at(trailer.footer_offset as usize);
    let footer = resealed(Seal::Block(0x50), footer, edit);
    let front = [front, &footer, &bytes[bytes.len() - TRAILER_LEN..]].concat();
    with_trailer(&front, |body| body[12..16].copy_from_slice(&(footer.len() as u32).to_le_bytes()))
}

const PAGE: Seal = Seal::Block(0x10);
const NODE: Seal = Seal::Block(0x20);
const PATCH: Seal = Seal::Block(0x30);
const RECORD: Seal = Seal::Block(0x40);

/// Where the objects of the golden nodes begin: behind level, padding and two counts.
const NODE_OBJECTS: usize = 6;
/// Where the body's kind lies in golden records with an owner: behind numbers, names, ids and the previous digest.
const RECORD_KIND: usize = 8 + 5 + 8 + (1 + 16 + 12 + 4) + 16 + 8 + 32 + 8 + 8;

fn edited_page_block(bytes: &[u8]) -> Vec<u8> {
    resealed(PAGE, bytes, |page| page[0] ^= 1)
}

/// Damage that any structure may suffer, and what the structure's own lies would be.
const DAMAGES: &[(&str, &str, &str, Damage)] = &[
    ("page-raw", "flipped", "Checksum", |b| flipped(b, 2000)),
    ("page-raw", "truncated", "Truncated", |b| b[..b.len() - 1].to_vec()),
    ("page-raw", "wrong-hash", "Mismatch", edited_page_block),
    ("page-raw", "short", "Invalid", |b| resealed(PAGE, b, |page| page.truncate(4095))),
    ("page-raw", "wrong-kind", "Mismatch", |b| resealed(NODE, b, |_| {})),
    ("page-raw", "unknown-kind", "Invalid", |b| resealed(Seal::Block(0x60), b, |_| {})),
    ("page-raw", "unknown-codec", "Invalid", |b| resealed(Seal::Block(0x12), b, |_| {})),
    ("page-raw", "hostile-length", "Truncated", |b| [&[0x10, 0xf0, 0xff, 0xff], &b[4..]].concat()),
    ("page-zstd", "flipped", "Checksum", |b| flipped(b, 20)),
    ("page-zstd", "truncated", "Truncated", |b| b[..b.len() / 2].to_vec()),
    ("page-zstd", "garbage", "Invalid", |b| resealed(Seal::Block(0x11), b, |page| page[0] ^= 1)),
    // A frame that says it holds 2^60 bytes.
    ("page-zstd", "hostile-length", "Invalid", |_| {
        seal_block(0x11, &[0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0x03, 0, 0, 0])
    }),
    ("node-leaf", "flipped", "Checksum", |b| flipped(b, 100)),
    ("node-leaf", "truncated", "Truncated", |b| b[..7].to_vec()),
    ("node-leaf", "hostile-count", "Invalid", |b| resealed(NODE, b, |node| node[4..6].fill(0xff))),
    ("node-leaf", "wrong-count", "Invalid", |b| resealed(NODE, b, |node| node[4] -= 1)),
    ("node-leaf", "hostile-objects", "Truncated", |b| {
        resealed(NODE, b, |node| (node.truncate(20), node[2..4].copy_from_slice(&512_u16.to_le_bytes())).1)
    }),
    ("node-leaf", "level", "Invalid", |b| resealed(NODE, b, |node| node[0] = 6)),
    ("node-leaf", "longer", "Invalid", |b| resealed(NODE, b, |node| node.push(0))),
    // The first object is named as the second is: an own reference in place of a pack's.
    ("node-leaf", "object-twice", "Invalid", |b| {
        resealed(NODE, b, |node| {
            node.splice(NODE_OBJECTS..NODE_OBJECTS + 17, [0]);
        })
    }),
    ("node-inner", "flipped", "Checksum", |b| flipped(b, 9)),
    ("node-inner", "own-by-name", "Invalid", |b| {
        resealed(NODE, b, |node| {
            node.splice(NODE_OBJECTS..NODE_OBJECTS + 1, [&[1][..], &[0x5a; 16]].concat());
        })
    }),
    ("node-inner", "empty", "Invalid", |_| seal_block(0x20, &[&[1, 0, 0, 0, 0, 0][..], &[0; 64]].concat())),
    ("patch", "flipped", "Checksum", |b| flipped(b, 50)),
    ("patch", "truncated", "Truncated", |b| b[..b.len() - 1].to_vec()),
    // The last slot, emptied, is made the same as the first.
    ("patch", "slots-out-of-order", "Invalid", |b| {
        resealed(PATCH, b, |patch| {
            let end = patch.len();
            patch[end - 2..].copy_from_slice(&(1_u16 | 1 << 15).to_le_bytes());
        })
    }),
    ("patch", "slot-out-of-range", "Invalid", |b| {
        resealed(PATCH, b, |patch| {
            let end = patch.len();
            patch[end - 2..].copy_from_slice(&(512_u16 | 1 << 15).to_le_bytes());
        })
    }),
    ("header-pack", "flipped", "Checksum", |b| flipped(b, 8)),
    ("header-pack", "truncated", "Truncated", |b| b[..63].to_vec()),
    ("header-pack", "magic", "Magic", |b| resealed(Seal::Behind, b, |header| header[0] = b'e')),
    ("header-pack", "newer", "NewerVersion", |b| resealed(Seal::Behind, b, |header| header[8] = 2)),
    ("header-pack", "feature", "UnknownFeatures", |b| resealed(Seal::Behind, b, |header| header[12] = 1)),
    ("header-pack", "reserved", "Invalid", |b| resealed(Seal::Behind, b, |header| header[59] = 1)),
    ("header-pack", "wrong-repository", "Mismatch", |b| resealed(Seal::Behind, b, |header| header[16] ^= 1)),
    ("header-pack", "wrong-id", "Mismatch", |b| resealed(Seal::Behind, b, |header| header[32] ^= 1)),
    ("header-record", "flipped", "Checksum", |b| flipped(b, 33)),
    ("header-record", "wrong-number", "Mismatch", |b| resealed(Seal::Behind, b, |header| header[32] += 1)),
    ("pack", "flipped", "Checksum", |b| flipped(b, 100)),
    ("pack", "truncated", "Magic", |b| b[..b.len() - 40].to_vec()),
    ("pack", "newer", "NewerVersion", |b| with_trailer(b, |trailer| trailer[24] = 2)),
    ("pack", "feature", "UnknownFeatures", |b| with_trailer(b, |trailer| trailer[26] = 4)),
    ("pack", "hostile-footer", "Invalid", |b| with_trailer(b, |trailer| trailer[12..16].fill(0xff))),
    ("pack", "record-invented", "Invalid", |b| {
        with_trailer(b, |trailer| {
            let end = u32::from_le_bytes(trailer[8..12].try_into().unwrap());
            trailer[16..20].copy_from_slice(&(end - 100).to_le_bytes());
            trailer[20] = 100;
        })
    }),
    ("pack", "gap", "Invalid", |b| with_footer(b, |footer| footer[40 + 32] += 1)),
    ("pack", "block-missing", "Invalid", |b| with_footer(b, |footer| footer.truncate(footer.len() - 40))),
    ("pack", "half-entry", "Invalid", |b| with_footer(b, |footer| footer.truncate(footer.len() - 20))),
    ("pack", "wrong-hash", "Mismatch", |b| with_footer(b, |footer| footer[0] ^= 1)),
    ("record-object", "flipped", "Checksum", |b| flipped(b, b.len() - 60)),
    ("record-object", "record-lost", "Invalid", |b| with_trailer(b, |trailer| trailer[16..24].fill(0))),
    ("record-create", "flipped", "Checksum", |b| flipped(b, 30)),
    ("record-create", "wrong-machine", "Mismatch", |b| resealed(RECORD, b, |record| record[9] ^= 1)),
    ("record-create", "wrong-number", "Mismatch", |b| resealed(RECORD, b, |record| record[0] += 1)),
    ("record-create", "unlinked", "Invalid", |b| resealed(RECORD, b, |record| record[46..78].fill(0))),
    ("record-commit-inline", "flipped", "Checksum", |b| flipped(b, 300)),
    ("record-commit-inline", "hostile-packs", "Truncated", |b| {
        resealed(RECORD, b, |record| record[RECORD_KIND + 1 + 8 + 1 + 64..][..4].fill(0xff))
    }),
    ("record-commit-inline", "longer", "Invalid", |b| resealed(RECORD, b, |record| record.push(0))),
    ("record-commit-image", "flipped", "Checksum", |b| flipped(b, 200)),
    ("record-commit-image", "place-overflows", "Invalid", |b| {
        resealed(RECORD, b, |record| {
            let end = record.len();
            record[end - 7..].fill(0xff);
        })
    }),
    ("record-term", "flipped", "Checksum", |b| flipped(b, 10)),
    // A kind that came later, and one that has not come yet.
    ("record-term", "unknown-kind", "Truncated", |b| resealed(RECORD, b, |record| record[RECORD_KIND] = 8)),
    ("record-term", "kind-of-nothing", "Invalid", |b| resealed(RECORD, b, |record| record[RECORD_KIND] = 0x7f)),
    ("record-barrier", "flipped", "Checksum", |b| flipped(b, 20)),
    ("record-barrier", "no-generation", "Invalid", |b| {
        resealed(RECORD, b, |record| {
            record[RECORD_KIND] = 8;
            record.drain(RECORD_KIND + 1..RECORD_KIND + 9);
        })
    }),
    ("record-tag-heeding", "generation-0", "Invalid", |b| {
        resealed(RECORD, b, |record| record[RECORD_KIND + 1..RECORD_KIND + 9].fill(0))
    }),
    ("record-release", "flag", "Invalid", |b| resealed(RECORD, b, |record| record[21] = 2)),
    ("record-tag", "flipped", "Checksum", |b| flipped(b, 60)),
    ("record-tag", "bad-name", "Name", |b| {
        resealed(RECORD, b, |record| {
            let end = record.len();
            record[end - 7..].copy_from_slice(b"1234567");
        })
    }),
    ("record-tag", "later-epoch", "Invalid", |b| resealed(RECORD, b, |record| record[RECORD_KIND + 1] = 43)),
    ("record-untag", "not-text", "Invalid", |b| {
        resealed(RECORD, b, |record| {
            let end = record.len();
            record[end - 1] = 0xff;
        })
    }),
    ("record-drop", "hostile-count", "Truncated", |b| {
        resealed(RECORD, b, |record| record[RECORD_KIND + 1..][..4].fill(0xff))
    }),
    ("record-drop", "out-of-order", "Invalid", |b| resealed(RECORD, b, |record| record[RECORD_KIND + 5 + 8] = 1)),
    ("record-remove", "flipped", "Checksum", |b| flipped(b, 20)),
    ("record-remove", "truncated", "Truncated", |b| resealed(RECORD, b, |record| record.truncate(RECORD_KIND))),
    ("manifest", "truncated", "Truncated", |b| b[..b.len() - 1].to_vec()),
    ("manifest", "hostile-count", "Truncated", |b| [&[0xff; 4], &b[4..]].concat()),
    ("manifest", "longer", "Invalid", |b| [b, &[0]].concat()),
    ("manifest", "dot-dot", "Name", |b| {
        let mut bytes = b.to_vec();
        bytes[4..6].copy_from_slice(&2_u16.to_le_bytes());
        bytes.splice(6..13, *b"..");
        bytes
    }),
    // The first path, "current", is made to come after the second, "disks".
    ("manifest", "out-of-order", "Invalid", |b| {
        let mut bytes = b.to_vec();
        bytes[6] = b'x';
        bytes
    }),
    ("epochfs", "flipped", "Checksum", |b| flipped(b, 40)),
    ("epochfs", "truncated", "Checksum", |b| b[..b.len() / 2].to_vec()),
    ("epochfs", "newer", "NewerVersion", |b| replaced(b, "\"version\": 1,", "\"version\": 3,\n  \"shape\": \"new\",")),
    ("epochfs", "page-size", "Invalid", |b| replaced(b, "4096", "8192")),
    ("epochfs", "unknown-field", "Invalid", |b| {
        replaced(b, "\"version\": 1,", "\"version\": 1,\n  \"shape\": \"new\",")
    }),
    ("epochfs-sealed", "flipped", "Checksum", |b| flipped(b, 40)),
    ("epochfs-sealed", "not-sealed", "Invalid", |b| replaced(b, "\"version\": 2,", "\"version\": 1,")),
    ("epochfs-sealed", "other-cipher", "Invalid", |b| replaced(b, "aes-256-gcm", "aes-128-gcm")),
    ("epochfs-sealed", "other-segments", "Invalid", |b| replaced(b, "16384", "32768")),
    ("epochfs", "sealed-without-cipher", "Invalid", |b| replaced(b, "\"version\": 1,", "\"version\": 2,")),
    ("epochfs", "spaced", "Invalid", |b| replaced(b, "\"version\": 1,", "\"version\":  1,")),
    ("heartbeat", "flipped", "Checksum", |b| flipped(b, 60)),
    ("heartbeat", "truncated", "Truncated", |b| resealed(Seal::Behind, b, |body| body.truncate(body.len() - 1))),
    ("heartbeat", "newer", "NewerVersion", |b| resealed(Seal::Behind, b, |body| body[8] = 2)),
    ("heartbeat", "wrong-repository", "Mismatch", |b| resealed(Seal::Behind, b, |body| body[10] ^= 1)),
    ("heartbeat", "purpose", "Invalid", |b| resealed(Seal::Behind, b, |body| body[HEARTBEAT_PURPOSE] = 3)),
    ("heartbeat", "hostile-count", "Invalid", |b| {
        resealed(Seal::Behind, b, |body| body[HEARTBEAT_PURPOSE + 34..][..2].fill(0xff))
    }),
    ("heartbeat", "out-of-order", "Invalid", |b| {
        resealed(Seal::Behind, b, |body| body[HEARTBEAT_PURPOSE + 34 + 3] = b'z')
    }),
    ("heartbeat", "bad-name", "Name", |b| {
        resealed(Seal::Behind, b, |body| {
            let end = body.len();
            body[end - 9] = b'/';
        })
    }),
    ("host-order", "flipped", "Checksum", |b| flipped(b, 40)),
    ("host-order", "longer", "Invalid", |b| resealed(Seal::Behind, b, |body| body.push(0))),
    ("host-order", "magic", "Invalid", |b| resealed(Seal::Behind, b, |body| body[7] = b'T')),
];

fn flipped(bytes: &[u8], index: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[index] ^= 0x10;
    bytes
}

#[test]
fn damaged_twins_are_refused_for_their_reason() {
    assert_eq!(FORMAT_VERSION, 1, "a new version needs vectors of its own beside the old");
    let all: Vec<Target> = targets().into_iter().chain(objects()).collect();
    for target in &all {
        let name = target.name;
        assert!(DAMAGES.iter().any(|(damaged, ..)| *damaged == name), "{name} has no damaged twin");
    }
    let mut wrong = Vec::new();
    for (name, how, expected, damage) in DAMAGES {
        let target = all.iter().find(|target| target.name == *name).expect("the damaged vector exists");
        let good = stored(&target.file(), &|| target.bytes.clone());
        let (stem, ending) = target.file().split_once('.').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        let bytes = stored(&format!("damaged/{stem}.{how}.{ending}"), &|| damage(&good));
        assert!(bytes != good, "{name}.{how} is not damaged");
        match (target.decode)(&bytes) {
            Ok(_) => wrong.push(format!("{name}.{how} is accepted")),
            Err(error) if kind_of(&error) != *expected => {
                wrong.push(format!("{name}.{how}: {error:?}, not {expected}"))
            }
            Err(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_file_belongs_to_a_test() {
    let all: Vec<Target> = targets().into_iter().chain(objects()).collect();
    let count = |path: PathBuf| fs::read_dir(path).unwrap().filter(|e| e.as_ref().unwrap().path().is_file()).count();
    // Golden vectors and their twins, which the tests above write if asked to: run alone, this one waits for them.
    if std::env::var_os("EPOCHFS_BLESS").is_none() {
        assert_eq!(count(directory()), all.len());
        assert_eq!(count(directory().join("damaged")), DAMAGES.len());
    }
}

#[test]
fn a_block_decodes_alone_and_says_where_it_ends() {
    let all = targets();
    let find = |name| &all.iter().find(|target| target.name == name).unwrap().bytes;
    let both = [find("patch").as_slice(), find("node-inner")].concat();
    let (first, rest) = Block::split(&both).unwrap();
    assert_eq!((first.kind, rest), (BlockKind::Patch, find("node-inner").as_slice()));
    assert!(Block::only(&both, BlockKind::Patch).is_err());
}

/// The sizes that FORMAT.md states.
#[test]
fn sizes_are_the_documented_ones() {
    let own = vectors::record_object();
    let in_pack = |offset| vectors::place(ObjectRef::Pack([1; 16]), offset, 100);
    let here = |offset| vectors::place(own.clone(), offset, 100);
    let mut editor = NodeEditor::new(0);
    (0..FANOUT).for_each(|slot| editor.set(slot, [slot as u8; 32], &here(64 + slot as u32)));
    let leaf = editor.finish();
    let mut bytes = Vec::new();
    assert_eq!(leaf.put_whole(Some(&own), &mut bytes), 21_071);
    for slots in [1_u16, 100, 244] {
        let all: Vec<u16> = (0..slots).collect();
        assert_eq!(leaf.put_patch(&in_pack(64), &all, Some(&own), &mut bytes), 39 + 43 * u32::from(slots));
    }
    let is_patched = |slots, changed, first| leaf.patch_is_worth_it(slots, changed, &[first; 32]);
    assert!(is_patched(244, 244, 0) && !is_patched(245, 245, 0));
    // Five slots a time: 70 of them have taken as much as a whole node, a few more or less by the digest.
    assert!(is_patched(60, 5, 0) && !is_patched(61, 5, 0) && is_patched(77, 5, 255) && !is_patched(78, 5, 255));
    assert!(is_patched(27, 1, 0) && !is_patched(28, 1, 0));
    // Hot ones that change each time may stay a patch.
    assert!(is_patched(100, 100, 0));
    for (entries, is_patched) in [(48, false), (49, true)] {
        let mut editor = NodeEditor::new(1);
        (0..entries).for_each(|slot| editor.set(slot, [slot as u8; 32], &here(64 + slot as u32)));
        assert_eq!(editor.finish().patch_is_worth_it(1, 1, &[0; 32]), is_patched);
    }
    let gibibyte = 1 << 30;
    let levels = [(0, 0), (2 << 20, 1), (gibibyte, 2), (4 * gibibyte, 3), (512 * gibibyte, 3), (u64::MAX, 6)];
    assert!(levels.iter().all(|(length, levels)| levels_for(*length) == *levels));

    // The smallest commit: a page, a patch on each of three levels, the record.
    let image = Image { length: 64 * gibibyte, root: Some(Root { digest: [1; 32], place: here(64) }) };
    let kind = EntryKind::Stream(image);
    let entry = ManifestEntry { path: b"memory".to_vec(), attributes: Default::default(), kind };
    let commit = Commit {
        origin: None,
        tags: Vec::new(),
        packs: Vec::new(),
        message: String::new(),
        notes: Vec::new(),
        manifest: ManifestPlace::Inline(Manifest::new(vec![entry]).unwrap()),
        ..vectors::inline_commit()
    };
    let record = vectors::record(Body::Commit(commit));
    let record_len = record.put_block(Some(&own), &mut bytes).0;
    assert_eq!(record_len, 309);
    let page_len = 1500;
    let mut footer = FooterBuilder::new();
    footer.push(BlockKind::Page, [0; 32], 8 + page_len);
    for _ in 0..3 {
        footer.push(BlockKind::Patch, [0; 32], 39 + 43);
    }
    footer.push(BlockKind::Record, [0; 32], record_len);
    assert_eq!(footer.end() as usize + footer.finish().len(), 867 + page_len as usize);
    let takeover = vectors::record(Body::Term).put_block(Some(&own), &mut bytes).0;
    let mut footer = FooterBuilder::new();
    footer.push(BlockKind::Record, [0; 32], takeover);
    assert_eq!(footer.end() as usize + footer.finish().len(), 279);
    let barrier = vectors::record(Body::Barrier { exists: true }).put_block(Some(&own), &mut bytes).0;
    let mut footer = FooterBuilder::new();
    footer.push(BlockKind::Record, [0; 32], barrier);
    assert_eq!(footer.end() as usize + footer.finish().len(), 288);
    assert_eq!(HEADER_LEN + FooterBuilder::new().finish().len(), 104);
}
