//! Whatever the bytes: no panic, no allocation beyond what the input's length allows, and no value that cannot be written
//! again. Damage under a checksum is always refused.
//!
//! `EPOCHFS_LONG=1` runs many more cases.

mod vectors;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use epochfs_format::{FormatError, Manifest, Node, NodeEditor, ObjectRef, Record, StoredNode, decode_node};
use proptest::prelude::*;
use proptest::test_runner::Config;
use vectors::{Seal, Target, Value, objects, parts, targets};

/// Counts what each thread has allocated, and the most it ever had at a time.
struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let live = LIVE.get() + bytes;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator unchanged; the counters are thread-local cells without destructors,
// which neither allocate nor fail.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps to the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller keeps to the contract of `dealloc`, and every pointer is the system allocator's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The most memory that decoding may take for an input of this length. Strings of one byte cost 24 times their bytes.
fn memory_bound(input_len: usize) -> isize {
    (64 << 10) + 32 * input_len as isize
}

type Outcome = Result<Box<dyn Value>, FormatError>;

/// Decodes, and fails if that panics or takes too much memory.
fn decode(target: &Target, bytes: &[u8]) -> Outcome {
    let before = LIVE.get();
    PEAK.set(before);
    let outcome = catch_unwind(AssertUnwindSafe(|| (target.decode)(bytes)))
        .unwrap_or_else(|_| panic!("{}: decoding panics on {bytes:02x?}", target.name));
    let taken = PEAK.get() - before;
    // Some decoders build what they compare with.
    let bound = memory_bound(bytes.len().max(16 << 10));
    assert!(taken <= bound, "{}: decoding {} bytes takes {taken} bytes of memory", target.name, bytes.len());
    outcome
}

/// What was accepted is written as bytes that say the same; where there is one encoding of each value, as these bytes.
fn check_accepted(target: &Target, bytes: &[u8], value: &dyn Value) {
    let Some(again) = value.again() else { return };
    if target.canonical {
        assert!(again == bytes, "{}: two encodings of {}\n{bytes:02x?}\n{again:02x?}", target.name, value.view());
    }
    // A page's codec may change; everything else is known by now.
    let back = if target.name.starts_with("page-") { unproven_page(&again) } else { (target.decode)(&again) };
    let back = back.unwrap_or_else(|error| panic!("{}: what it writes is refused: {error}", target.name));
    assert!(back.view() == value.view(), "{}: what it writes says something else", target.name);
}

fn unproven_page(bytes: &[u8]) -> Outcome {
    let target = parts().into_iter().find(|target| target.name == "page-unproven").unwrap();
    (target.decode)(bytes)
}

fn golden(target: &Target) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(target.file());
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn is_long() -> bool {
    std::env::var_os("EPOCHFS_LONG").is_some()
}

fn config(cases: u32) -> Config {
    Config { cases: if is_long() { cases * 100 } else { cases }, failure_persistence: None, ..Config::default() }
}

/// The single-bit flips that the decoder did not report, by byte.
fn unreported_flips(bytes: &[u8], decode: impl Fn(&[u8]) -> Outcome) -> Vec<usize> {
    let mut unreported = Vec::new();
    let mut flipped = bytes.to_vec();
    for bit in 0..bytes.len() * 8 {
        flipped[bit / 8] ^= 1 << (bit % 8);
        if decode(&flipped).is_ok() {
            unreported.push(bit / 8);
        }
        flipped[bit / 8] ^= 1 << (bit % 8);
    }
    unreported.dedup();
    unreported
}

#[test]
fn every_flipped_bit_is_refused() {
    for target in targets().iter().filter(|target| !matches!(target.seal, Seal::Open)) {
        let bytes = golden(target);
        let unreported = unreported_flips(&bytes, |bytes| decode(target, bytes));
        assert!(unreported.is_empty(), "{}: flips at {unreported:?} are not reported", target.name);
    }
    for target in parts() {
        let unreported = unreported_flips(&target.bytes, |bytes| decode(&target, bytes));
        assert!(unreported.is_empty(), "{}: flips at {unreported:?} are not reported", target.name);
    }
}

#[test]
fn every_flipped_bit_of_an_object_is_refused() {
    for target in objects() {
        let bytes = golden(&target);
        let unreported = unreported_flips(&bytes, |bytes| (target.decode)(bytes));
        assert!(unreported.is_empty(), "{}: flips at {unreported:?} are not reported", target.name);
    }
}

/// A manifest has no checksum of its own: a flip may make another manifest, and that one must be sound.
#[test]
fn flips_without_a_checksum_make_refusals_or_sound_values() {
    let all = targets();
    for target in all.iter().filter(|target| matches!(target.seal, Seal::Open)) {
        let mut bytes = golden(target);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(value) = decode(target, &bytes) {
                assert!(value.view() != target.expected, "{}: the flip of bit {bit} changes nothing", target.name);
                check_accepted(target, &bytes, &*value);
            }
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

/// Inner fields are damaged and the checksum made to fit: refused, or another sound value.
#[test]
fn resealed_flips_make_refusals_or_sound_values() {
    for target in targets().iter().chain(&parts()) {
        let mut body = target.seal.open(&golden_or_own(target));
        // Pages are large and all alike inside.
        let bits = if target.name.starts_with("page-") { body.len().min(64) * 8 } else { body.len() * 8 };
        for bit in 0..bits {
            body[bit / 8] ^= 1 << (bit % 8);
            let bytes = target.seal.close(&body);
            if let Ok(value) = decode(target, &bytes) {
                check_accepted(target, &bytes, &*value);
            }
            body[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

fn golden_or_own(target: &Target) -> Vec<u8> {
    if parts().iter().any(|part| part.name == target.name) { target.bytes.clone() } else { golden(target) }
}

/// The canary: the harness sees a decoder that has forgotten a check.
#[test]
fn a_weakened_decoder_is_noticed() {
    let all = targets();
    let record = all.iter().find(|target| target.name == "record-tag").unwrap();
    let bytes = golden(record);

    // Forgets the checksum: computes the one that fits, whatever came.
    let forgets_checksum = |bytes: &[u8]| decode(record, &record.seal.close(&record.seal.open(bytes)));
    let unreported = unreported_flips(&bytes, forgets_checksum);
    assert!(unreported.len() > 20, "only {unreported:?}");

    // Forgets the last byte of it.
    let forgets_byte = |flipped: &[u8]| {
        let mut flipped = flipped.to_vec();
        flipped[7] = bytes[7];
        decode(record, &flipped)
    };
    assert_eq!(unreported_flips(&bytes, forgets_byte), [7]);

    // Takes more memory than the input warrants, or panics.
    let greedy = Target { decode: |_| Ok(Box::new(Bytes(Vec::with_capacity(8 << 20)))), ..find("record-tag") };
    assert!(catch_unwind(AssertUnwindSafe(|| decode(&greedy, &bytes).is_ok())).is_err());
    let panics = Target { decode: |bytes| Ok(Box::new(Bytes(vec![bytes[bytes.len()]]))), ..find("record-tag") };
    assert!(catch_unwind(AssertUnwindSafe(|| decode(&panics, &bytes).is_ok())).is_err());

    // Takes a second encoding, or writes another value than it read.
    let lax = Target { decode: |bytes| Ok(Box::new(Bytes(bytes[..2].to_vec()))), ..find("record-tag") };
    let value = decode(&lax, b"abc").unwrap();
    assert!(catch_unwind(AssertUnwindSafe(|| check_accepted(&lax, b"abc", &*value))).is_err());
}

fn find(name: &str) -> Target {
    targets().into_iter().find(|target| target.name == name).unwrap()
}

struct Bytes(Vec<u8>);

impl Value for Bytes {
    fn view(&self) -> String {
        format!("{:?}", self.0)
    }
    fn again(&self) -> Option<Vec<u8>> {
        Some(self.0.clone())
    }
}

#[test]
fn every_truncation_is_refused() {
    for target in targets().iter().chain(&objects()) {
        let bytes = golden(target);
        for len in 0..bytes.len() {
            assert!(decode(target, &bytes[..len]).is_err(), "{} of {len} bytes is accepted", target.name);
        }
    }
    for target in parts() {
        for len in 0..target.bytes.len() {
            assert!(decode(&target, &target.bytes[..len]).is_err(), "{} of {len} bytes is accepted", target.name);
        }
    }
}

#[test]
fn every_resealed_truncation_is_refused() {
    for target in targets().iter().chain(&parts()).filter(|target| !matches!(target.seal, Seal::Text)) {
        let body = target.seal.open(&golden_or_own(target));
        let start = if target.name.starts_with("page-") { body.len().saturating_sub(64) } else { 0 };
        for len in start..body.len() {
            let bytes = target.seal.close(&body[..len]);
            assert!(decode(target, &bytes).is_err(), "{} with a body of {len} bytes is accepted", target.name);
        }
    }
}

/// One thing that a hostile writer does to the bytes of a structure.
#[derive(Clone, Debug)]
enum Edit {
    Set(usize, u8),
    Fill(usize, usize, u8),
    Insert(usize, Vec<u8>),
    Delete(usize, usize),
    /// Copies a piece of the bytes over another.
    Copy(usize, usize, usize),
}

impl Edit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let len = bytes.len();
        let (at, size) = match self {
            _ if len == 0 => return,
            Self::Set(at, _) | Self::Insert(at, _) => (at % len, 1),
            Self::Fill(at, size, _) | Self::Delete(at, size) | Self::Copy(at, _, size) => {
                (at % len, (*size).min(len - at % len))
            }
        };
        match self {
            Self::Set(_, value) => bytes[at] = *value,
            Self::Fill(_, _, value) => bytes[at..at + size].fill(*value),
            Self::Insert(_, new) => drop(bytes.splice(at..at, new.iter().copied())),
            Self::Delete(..) => drop(bytes.drain(at..at + size)),
            Self::Copy(_, to, _) => {
                let piece = bytes[at..at + size].to_vec();
                let to = to % (len - size + 1);
                bytes[to..to + size].copy_from_slice(&piece);
            }
        }
    }
}

fn edit() -> impl Strategy<Value = Edit> {
    let interesting = prop_oneof![any::<u8>(), Just(0), Just(1), Just(0xff), Just(0x7f)];
    prop_oneof![
        4 => (any::<usize>(), interesting.clone()).prop_map(|(at, value)| Edit::Set(at, value)),
        1 => (any::<usize>(), 1..12_usize, interesting).prop_map(|(at, size, value)| Edit::Fill(at, size, value)),
        1 => (any::<usize>(), prop::collection::vec(any::<u8>(), 1..60)).prop_map(|(at, new)| Edit::Insert(at, new)),
        1 => (any::<usize>(), 1..60_usize).prop_map(|(at, size)| Edit::Delete(at, size)),
        1 => (any::<usize>(), any::<usize>(), 1..60_usize).prop_map(|(at, to, size)| Edit::Copy(at, to, size)),
    ]
}

#[test]
fn mutated_bytes_with_fitting_checksums_are_refused_or_sound() {
    let mut all = targets();
    all.extend(parts());
    let bodies: Vec<Vec<u8>> = all.iter().map(|target| target.seal.open(&target.bytes)).collect();
    let strategy = (0..all.len(), prop::collection::vec(edit(), 1..5));
    proptest!(config(256 * 16), |((index, edits) in strategy)| {
        let mut body = bodies[index].clone();
        edits.iter().for_each(|edit| edit.apply(&mut body));
        let target = &all[index];
        let bytes = target.seal.close(&body);
        if let Ok(value) = decode(target, &bytes) {
            check_accepted(target, &bytes, &*value);
        }
    });
}

#[test]
fn random_bytes_are_refused_or_sound() {
    let mut all = targets();
    all.extend(parts());
    all.extend(objects());
    let strategy = (0..all.len(), prop::collection::vec(any::<u8>(), 0..2000), any::<bool>());
    proptest!(config(256 * 4), |((index, body, sealed) in strategy)| {
        let target = &all[index];
        let bytes = if sealed { target.seal.close(&body) } else { body };
        if let Ok(value) = decode(target, &bytes) {
            check_accepted(target, &bytes, &*value);
        }
    });
}

/// Counts that promise far more than the bytes hold, at every position of every structure.
#[test]
fn hostile_counts_take_no_memory() {
    for target in targets().iter().chain(&parts()) {
        let body = target.seal.open(&target.bytes);
        let end = if target.name.starts_with("page-") { body.len().min(64) } else { body.len() };
        for at in 0..end {
            for size in [1, 2, 3, 4, 8] {
                let mut body = body.clone();
                let stop = (at + size).min(body.len());
                body[at..stop].fill(0xff);
                // A body that ends behind the lie, and one that goes on.
                for len in [body.len(), stop] {
                    let _ = decode(target, &target.seal.close(&body[..len]));
                }
            }
        }
    }
}

mod any_value {
    //! Any value that a writer may write.

    use std::sync::Arc;

    use epochfs_format::{
        Attributes, Body, Commit, EntryKind, HEADER_LEN, Image, ManifestEntry, ManifestPlace, Owner, Place, Root,
    };

    use super::*;

    pub fn hash() -> impl Strategy<Value = [u8; 32]> {
        any::<[u8; 32]>()
    }

    pub fn machine() -> impl Strategy<Value = Arc<str>> {
        prop_oneof!["[a-z][a-z0-9.-]{0,20}", "[a-z\u{fc}\u{4e00} %]{1,20}"].prop_map(Into::into)
    }

    pub fn own() -> ObjectRef {
        vectors::record_object()
    }

    pub fn object() -> impl Strategy<Value = ObjectRef> {
        prop_oneof![
            Just(own()),
            (0..4_u8).prop_map(|id| ObjectRef::Pack([id; 16])),
            any::<[u8; 16]>().prop_map(ObjectRef::Pack),
            (machine(), 1..u64::MAX).prop_map(|(machine, seq)| ObjectRef::Record { machine, seq }),
        ]
    }

    pub fn place() -> impl Strategy<Value = Place> {
        (object(), HEADER_LEN as u32..u32::MAX - (1 << 24), 9..1_u32 << 24).prop_map(|(object, offset, len)| Place {
            object,
            offset,
            len,
        })
    }

    pub fn node() -> impl Strategy<Value = Node> {
        let slots = prop_oneof![
            prop::collection::vec((0..512_usize, hash(), place()), 1..20),
            prop::collection::vec((0..512_usize, hash(), place()), 300..600),
        ];
        (0..6_u8, slots).prop_map(|(level, slots)| {
            let mut editor = NodeEditor::new(level);
            slots.iter().for_each(|(slot, hash, place)| editor.set(*slot, *hash, place));
            editor.finish()
        })
    }

    fn image() -> impl Strategy<Value = Image> {
        (1..=i64::MAX as u64, prop::option::of((hash(), place())))
            .prop_map(|(length, root)| Image { length, root: root.map(|(digest, place)| Root { digest, place }) })
    }

    fn entry() -> impl Strategy<Value = ManifestEntry> {
        let kind = prop_oneof![
            3 => image().prop_map(EntryKind::Stream),
            1 => Just(EntryKind::Directory),
            1 => prop::collection::vec(1..=u8::MAX, 1..100).prop_map(EntryKind::Symlink),
        ];
        let extended = prop::collection::btree_map(
            prop::collection::vec(1..=u8::MAX, 1..30),
            prop::collection::vec(any::<u8>(), 0..100),
            0..4,
        );
        let attributes = (any::<u32>(), any::<u32>(), any::<u32>(), any::<i64>(), extended).prop_map(
            |(mode, owner, group, modified_ns, extended)| Attributes {
                mode,
                owner,
                group,
                modified_ns,
                extended: extended.into_iter().collect(),
            },
        );
        ("[a-c]{1,2}(/[a-c\u{fc}\n]{1,3}){0,2}", attributes, kind).prop_map(|(path, attributes, kind)| ManifestEntry {
            path: path.into_bytes(),
            attributes,
            kind,
        })
    }

    /// Of entries that do not go together, those that do.
    pub fn manifest() -> impl Strategy<Value = Manifest> {
        prop::collection::vec(entry(), 0..12).prop_map(|entries| {
            let mut kept: Vec<ManifestEntry> = Vec::new();
            for entry in entries {
                kept.push(entry);
                if Manifest::new(kept.clone()).is_err() {
                    kept.pop();
                }
            }
            Manifest::new(kept).unwrap()
        })
    }

    fn tag() -> impl Strategy<Value = String> {
        "[a-z][a-z0-9\u{fc} ]{0,30}".prop_filter("it names an epoch", |tag| tag != "latest")
    }

    fn commit(seq: u64) -> impl Strategy<Value = Commit> {
        let numbers = (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>());
        let texts =
            (prop::collection::vec(tag(), 0..3), ".{0,200}", prop::collection::vec((".{0,60}", ".{0,200}"), 0..3));
        let place = prop_oneof![manifest().prop_map(ManifestPlace::Inline), image().prop_map(ManifestPlace::Image),];
        let packs = prop::collection::vec((any::<[u8; 16]>(), any::<u64>()), 0..5);
        (0..seq, prop::option::of((machine(), 1..u64::MAX)), hash(), numbers, packs, texts, place).prop_map(
            |(parent, origin, digest, numbers, packs, (tags, message, notes), manifest)| Commit {
                parent,
                origin,
                digest,
                logical_len: numbers.0,
                changed_pages: numbers.1,
                new_pages: numbers.2,
                stored_len: numbers.3,
                packs,
                tags,
                message,
                notes,
                manifest,
            },
        )
    }

    /// A record with the number and machine that the targets' decoder expects.
    pub fn record() -> impl Strategy<Value = Record> {
        let seq = vectors::SEQ;
        let body = prop_oneof![
            1 => Just(Body::Create),
            6 => commit(seq).prop_map(Body::Commit),
            1 => Just(Body::Term),
            1 => (1..seq, tag()).prop_map(|(epoch, name)| Body::Tag { epoch, name }),
            1 => tag().prop_map(|name| Body::Untag { name }),
            1 => prop::collection::btree_set(1..seq, 0..20)
                .prop_map(|epochs| Body::Drop { epochs: epochs.into_iter().collect() }),
            1 => Just(Body::Remove),
            1 => any::<bool>().prop_map(|exists| Body::Barrier { exists }),
        ];
        let owner = prop::option::of((any::<[u8; 16]>(), ".{0,60}", any::<u32>()));
        let previous = hash().prop_filter("it is the first record's", |hash| *hash != [0; 32]);
        let heeds = prop_oneof![Just(0), 1..u64::MAX];
        let numbers = (0..seq, 0..seq, heeds);
        (any::<u64>(), owner, any::<[u8; 16]>(), any::<u64>(), previous, numbers, body).prop_map(
            move |(term, owner, writer, time_ns, previous, (latest, last_edit, generation), body)| Record {
                machine: vectors::MACHINE.into(),
                seq,
                term,
                owner: owner.map(|(host, name, lease_ms)| Owner { host, name, lease_ms }),
                writer,
                time_ns,
                previous,
                latest_epoch: match &body {
                    Body::Commit(_) => seq,
                    Body::Create | Body::Remove | Body::Barrier { exists: false } => 0,
                    _ => latest,
                },
                last_edit,
                generation: if matches!(body, Body::Barrier { .. }) { generation.max(1) } else { generation },
                body,
            },
        )
    }
}

fn same_node(a: &Node, b: &Node) -> bool {
    vectors::view_node(a) == vectors::view_node(b) && a.digest() == b.digest()
}

#[test]
fn nodes_and_patches_come_back() {
    let own = any_value::own();
    let slots = prop::collection::vec(0..512_u16, 1..100);
    proptest!(config(256), |(node in any_value::node(), base in any_value::node(), at in any_value::place(), slots in slots)| {
        let mut bytes = Vec::new();
        let len = node.put_whole(Some(&own), &mut bytes);
        prop_assert_eq!(len as usize, bytes.len());
        let StoredNode::Whole(back) = decode_node(&bytes, &own).unwrap() else { panic!("it is whole") };
        prop_assert!(same_node(&back, &node));

        // Slots of the base as they are in another node.
        let mut editor = NodeEditor::of(&base);
        let mut full = base.count();
        for slot in slots.iter().map(|slot| usize::from(*slot)) {
            match (node.hash(slot), node.place(slot)) {
                (Some(hash), Some(place)) => editor.set(slot, *hash, &place),
                _ if full > slots.len() => { editor.clear(slot); full -= 1; }
                _ => {}
            }
        }
        let changed = editor.finish();
        let mut bytes = Vec::new();
        changed.put_patch(&at, &slots, Some(&own), &mut bytes);
        let StoredNode::Patch(patch) = decode_node(&bytes, &own).unwrap() else { panic!("it is a patch") };
        prop_assert_eq!(&patch.base, &at);
        prop_assert!(same_node(&patch.apply(&base).unwrap(), &changed));
    });
}

#[test]
fn manifests_come_back() {
    let own = any_value::own();
    proptest!(config(256), |(manifest in any_value::manifest())| {
        prop_assert_eq!(&Manifest::decode(&manifest.encode(Some(&own)), Some(&own)).unwrap(), &manifest);
        prop_assert_eq!(&Manifest::decode(&manifest.encode(None), None).unwrap(), &manifest);
    });
}

#[test]
fn records_come_back_and_may_move_to_another_number() {
    let own = any_value::own();
    proptest!(config(256), |(record in any_value::record())| {
        record.check().unwrap();
        let mut bytes = Vec::new();
        let (len, digest) = record.put_block(Some(&own), &mut bytes);
        prop_assert_eq!(len as usize, bytes.len());
        let (back, back_digest) = Record::decode_block(&bytes, &record.machine, record.seq).unwrap();
        prop_assert_eq!((&back, back_digest), (&record, digest));

        // Behind another record, the blocks stay and the record's length does too.
        let moved = Record { seq: record.seq + 1, latest_epoch: match record.latest_epoch {
            latest if latest == record.seq => latest + 1,
            latest => latest,
        }, ..record.clone() };
        let mut moved_bytes = Vec::new();
        let (moved_len, moved_digest) = moved.put_block(Some(&own), &mut moved_bytes);
        prop_assert_eq!(moved_len, len);
        prop_assert!(moved_digest != digest);
        let (back, _) = Record::decode_block(&moved_bytes, &moved.machine, moved.seq).unwrap();
        prop_assert_eq!(back.seq, record.seq + 1);
        prop_assert!(Record::decode_block(&moved_bytes, &record.machine, record.seq).is_err());
    });
}
