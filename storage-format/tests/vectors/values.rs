//! The values that the golden vectors hold.

use std::sync::Arc;

use epochfs_format::{
    Attributes, BlockKind, Body, Commit, Descriptor, EntryKind, FooterBuilder, Hash, Heartbeat, HostMachine, HostOrder,
    HostPurpose, HostWarmth, Image, Manifest, ManifestEntry, ManifestPlace, Node, NodeEditor, ObjectRef, Owner,
    PAGE_SIZE, Page, PageEncoder, Place, Record, Root, encode_header, hash_page, put_raw_block,
};

pub const REPOSITORY: [u8; 16] = *b"a repository id.";
pub const MACHINE: &str = "web1";
pub const SEQ: u64 = 42;
const TIME_NS: u64 = 1_790_000_000_123_456_789;

/// The pack that the golden pack is.
pub fn pack() -> ObjectRef {
    ObjectRef::Pack([0x5a; 16])
}

/// The record that the golden records are.
pub fn record_object() -> ObjectRef {
    ObjectRef::Record { machine: MACHINE.into(), seq: SEQ }
}

pub fn sealed_descriptor() -> Descriptor {
    Descriptor { is_sealed: true, ..descriptor() }
}

pub fn descriptor() -> Descriptor {
    Descriptor { id: REPOSITORY, created_ns: TIME_NS, is_sealed: false }
}

/// A page that does not shrink.
pub fn noise_page() -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for bytes in page.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.copy_from_slice(&state.to_le_bytes());
    }
    page
}

/// A page that shrinks well.
pub fn text_page() -> Page {
    let mut page = [0; PAGE_SIZE];
    for (index, line) in page.chunks_exact_mut(64).enumerate() {
        line.fill(b'.');
        let text = format!("line {index} of a page that zstd makes smaller");
        line[..text.len()].copy_from_slice(text.as_bytes());
    }
    page
}

fn hash(seed: u8) -> Hash {
    [seed; 32]
}

pub fn place(object: ObjectRef, offset: u32, len: u32) -> Place {
    Place { object, offset, len }
}

/// A leaf with pages in its own pack, in another, and in a log record.
pub fn leaf() -> Node {
    let other = ObjectRef::Pack([7; 16]);
    let record = ObjectRef::Record { machine: "db 2".into(), seq: 9 };
    let mut editor = NodeEditor::new(0);
    editor.set(0, hash(1), &place(other.clone(), 64, 4104));
    editor.set(1, hash(2), &place(pack(), 64, 300));
    editor.set(63, hash(3), &place(pack(), 364, 12));
    editor.set(64, hash(4), &place(record, 1000, 77));
    editor.set(511, hash(5), &place(other, u32::MAX - 4104, 4104));
    editor.finish()
}

pub fn inner() -> Node {
    let mut editor = NodeEditor::new(1);
    for slot in [0, 3, 300] {
        editor.set(slot, hash(slot as u8 + 10), &place(pack(), 64 + slot as u32, 1000));
    }
    editor.finish()
}

/// The place of the whole node that the golden patch changes.
pub fn patch_base() -> Place {
    place(ObjectRef::Pack([7; 16]), 9000, 400)
}

/// The slots of the golden patch: one set, one moved, one emptied.
pub const PATCH_SLOTS: [u16; 3] = [1, 2, 511];

/// The leaf as the golden patch leaves it.
pub fn patched() -> Node {
    let mut editor = NodeEditor::of(&leaf());
    editor.set(1, hash(2), &place(ObjectRef::Pack([8; 16]), 64, 299));
    editor.set(2, hash(6), &place(pack(), 400, 55));
    editor.clear(511);
    editor.finish()
}

fn image(object: ObjectRef) -> Image {
    Image { length: (4 << 20) + 1, root: Some(Root { digest: hash(20), place: place(object, 64, 500) }) }
}

/// A manifest with each kind of entry, its streams' trees in the object itself, in a pack and in another's record.
pub fn manifest(own: ObjectRef) -> Manifest {
    let attributes = |mode| Attributes {
        mode,
        owner: 1000,
        group: 107,
        modified_ns: -1,
        extended: vec![(b"user.b".to_vec(), b"two".to_vec()), (b"user.a".to_vec(), Vec::new())],
    };
    let entry = |path: &[u8], kind| ManifestEntry { path: path.to_vec(), attributes: attributes(0o640), kind };
    Manifest::new(vec![
        entry(b"memory", EntryKind::Stream(image(own))),
        entry(b"vmstate", EntryKind::Stream(image(ObjectRef::Pack([7; 16])))),
        entry(
            b"disks/root",
            EntryKind::Stream(image(ObjectRef::Record { machine: "b\u{fc}ro".into(), seq: 1_000_001 })),
        ),
        entry(b"disks", EntryKind::Directory),
        entry(b"current", EntryKind::Symlink(b"disks/root".to_vec())),
        entry(b"\xff\n", EntryKind::Stream(Image::default())),
        ManifestEntry {
            path: b"zeros".to_vec(),
            attributes: Attributes::default(),
            kind: EntryKind::Stream(Image { length: 8192, root: None }),
        },
    ])
    .expect("the golden manifest is allowed")
}

pub fn record(body: Body) -> Record {
    let latest_epoch = match &body {
        Body::Commit(_) => SEQ,
        Body::Create | Body::Remove => 0,
        _ => 40,
    };
    Record {
        machine: MACHINE.into(),
        seq: SEQ,
        term: 3,
        owner: Some(Owner { host: *b"the host's id ..", name: "rack4-node7".into(), lease_ms: 10_000 }),
        writer: *b"this attempt....",
        time_ns: TIME_NS,
        previous: hash(41),
        latest_epoch,
        last_edit: 17,
        generation: if matches!(body, Body::Barrier { .. }) { 41 } else { 0 },
        body,
    }
}

/// A commit that carries its manifest.
pub fn inline_commit() -> Commit {
    let manifest = manifest(record_object());
    Commit {
        parent: 40,
        origin: None,
        digest: manifest.digest(),
        logical_len: manifest.logical_len(),
        changed_pages: 3,
        new_pages: 2,
        stored_len: 12_345,
        packs: vec![([1; 16], 67_108_900), ([2; 16], 200)],
        tags: vec!["nightly".into(), "v1.2".into()],
        message: "before the upgrade\nof the kernel".into(),
        notes: vec![("vmm".into(), "qemu 10.1".into()), ("cpu".into(), "x86-64-v3".into())],
        manifest: ManifestPlace::Inline(manifest),
    }
}

/// A commit whose manifest is stored as an image: a clone's, whose blocks all lie elsewhere.
pub fn image_commit() -> Commit {
    Commit {
        parent: 0,
        origin: Some((Arc::from("db 2"), 9)),
        digest: hash(50),
        logical_len: 1 << 40,
        changed_pages: 0,
        new_pages: 0,
        stored_len: 0,
        packs: Vec::new(),
        tags: Vec::new(),
        message: String::new(),
        notes: Vec::new(),
        manifest: ManifestPlace::Image(image(record_object())),
    }
}

/// Every kind of record, by the name of its vector.
pub fn records() -> Vec<(&'static str, Record)> {
    let mut term = record(Body::Term);
    term.owner = None;
    let mut create = record(Body::Create);
    (create.owner, create.term) = (None, 1);
    let mut heeding = record(Body::Tag { epoch: 40, name: "gold".into() });
    heeding.generation = 41;
    vec![
        ("record-create", create),
        ("record-commit-inline", record(Body::Commit(inline_commit()))),
        ("record-commit-image", record(Body::Commit(image_commit()))),
        ("record-term", record(Body::Term)),
        ("record-release", term),
        ("record-tag", record(Body::Tag { epoch: 40, name: "gold \u{fc}".into() })),
        ("record-untag", record(Body::Untag { name: "gold \u{fc}".into() })),
        ("record-drop", record(Body::Drop { epochs: vec![1, 17, 41] })),
        ("record-remove", record(Body::Remove)),
        ("record-barrier", record(Body::Barrier { exists: true })),
        ("record-tag-heeding", heeding),
    ]
}

/// A whole object: its header, blocks, footer and trailer.
pub fn object(name: &ObjectRef, blocks: &[(BlockKind, Hash, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = encode_header(&REPOSITORY, name).to_vec();
    let mut footer = FooterBuilder::new();
    for (kind, hash, block) in blocks {
        assert_eq!(footer.push(*kind, *hash, block.len() as u32) as usize, bytes.len());
        bytes.extend_from_slice(block);
    }
    bytes.extend_from_slice(&footer.finish());
    bytes
}

pub fn blocks() -> Vec<(BlockKind, Hash, Vec<u8>)> {
    let mut text = Vec::new();
    PageEncoder::new(1).put(&text_page(), &mut text);
    let mut noise = Vec::new();
    put_raw_block(BlockKind::Page, &noise_page(), &mut noise);
    let mut whole = Vec::new();
    inner().put_whole(Some(&pack()), &mut whole);
    let mut patch = Vec::new();
    patched().put_patch(&patch_base(), &PATCH_SLOTS, Some(&pack()), &mut patch);
    vec![
        (BlockKind::Page, hash_page(&text_page()), text),
        (BlockKind::Page, hash_page(&noise_page()), noise),
        (BlockKind::Node, inner().digest(), whole),
        (BlockKind::Patch, patched().digest(), patch),
    ]
}

/// A small pack with a block of each kind.
pub fn pack_bytes() -> Vec<u8> {
    object(&pack(), &blocks())
}

/// A log record that carries the blocks of its commit. They call it by another name, as they must while its number
/// is not known; what is stored is the same.
pub fn record_bytes() -> Vec<u8> {
    let record = record(Body::Commit(inline_commit()));
    let mut block = Vec::new();
    record.put_block(Some(&record_object()), &mut block);
    let mut blocks = blocks();
    blocks.push((BlockKind::Record, [0; 32], block));
    object(&record_object(), &blocks)
}

pub fn heartbeat() -> Heartbeat {
    Heartbeat {
        repository: REPOSITORY,
        host: *b"the host's id ..",
        number: 42,
        name: "rack4-node7".into(),
        location: "zone1/rack4".into(),
        purpose: HostPurpose::Draining,
        is_accepting: true,
        lease_ms: 5_000,
        interval_ms: 1_500,
        memory: 64 << 30,
        memory_free: 40 << 30,
        cpus: 16,
        load_milli: 2_750,
        features: vec!["avx2".into(), "sse4_2".into()],
        machines: vec![
            HostMachine { machine: "db 1".into(), is_protected: false },
            HostMachine { machine: "web1".into(), is_protected: true },
        ],
        warmth: vec![HostWarmth { machine: "web2".into(), bytes: 300 << 20 }],
    }
}

pub fn host_order() -> HostOrder {
    HostOrder {
        repository: REPOSITORY,
        host: *b"the host's id ..",
        number: 3,
        purpose: HostPurpose::Maintenance,
        time_ns: TIME_NS,
        by: "rack1-node2".into(),
    }
}
