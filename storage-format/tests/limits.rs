//! What a caller could hand in and no reader would take is refused before anything is written.

mod vectors;

use epochfs_format::{
    Attributes, Body, EntryKind, Image, Manifest, ManifestEntry, Node, NodeEditor, ObjectRef, Record, Root, StoredNode,
    decode_node,
};
use vectors::{inline_commit, place, record};

fn entry(path: &str, kind: EntryKind) -> ManifestEntry {
    ManifestEntry { path: path.into(), attributes: Attributes::default(), kind }
}

fn stream(length: u64) -> EntryKind {
    EntryKind::Stream(Image { length, root: None })
}

fn with_extended(extended: Vec<(Vec<u8>, Vec<u8>)>) -> ManifestEntry {
    ManifestEntry {
        attributes: Attributes { extended, ..Attributes::default() },
        ..entry("memory", EntryKind::Directory)
    }
}

#[test]
fn manifests_are_checked_when_they_are_made() {
    let root = Root { digest: [1; 32], place: place(ObjectRef::Pack([1; 16]), 64, 100) };
    let refused = [
        vec![entry("a", stream(1)), entry("a", EntryKind::Directory)],
        vec![entry("a", stream(1)), entry("a-b", stream(1)), entry("a/b/c", stream(1))],
        vec![entry("a/b", EntryKind::Symlink(b"x".to_vec())), entry("a/b/c", stream(1))],
        vec![entry("a", stream(1 << 63))],
        vec![entry("a", EntryKind::Stream(Image { length: 0, root: Some(root) }))],
        vec![entry("a", EntryKind::Symlink(Vec::new()))],
        vec![entry("a", EntryKind::Symlink(vec![b'x'; 4097]))],
        vec![entry("a", EntryKind::Symlink(vec![b'x'; 70_000]))],
        vec![with_extended(vec![(vec![b'x'; 256], Vec::new())])],
        vec![with_extended(vec![(Vec::new(), Vec::new())])],
        vec![with_extended(vec![(b"x".to_vec(), vec![0; 65_537])])],
        vec![with_extended(vec![(b"x".to_vec(), b"1".to_vec()), (b"x".to_vec(), b"2".to_vec())])],
        vec![with_extended((0..70_000).map(|n| (n.to_string().into_bytes(), Vec::new())).collect())],
    ];
    for entries in refused {
        let text: String = format!("{entries:?}").chars().take(200).collect();
        assert!(Manifest::new(entries).is_err(), "{text}");
    }
    let allowed = Manifest::new(vec![
        entry("a/b/c", stream(i64::MAX as u64)),
        entry("a", EntryKind::Directory),
        entry("b", EntryKind::Symlink(vec![b'x'; 4096])),
        with_extended((0..65_535).map(|n| (n.to_string().into_bytes(), Vec::new())).collect()),
        entry(&["x"; 2048].join("/"), EntryKind::Directory),
    ])
    .unwrap();
    assert_eq!(Manifest::decode(&allowed.encode(None), None).unwrap(), allowed);
}

#[test]
fn records_are_checked_before_they_are_written() {
    let commit = |change: fn(&mut epochfs_format::Commit)| {
        let mut commit = inline_commit();
        change(&mut commit);
        record(Body::Commit(commit))
    };
    let with = |change: fn(&mut Record)| {
        let mut record = record(Body::Term);
        change(&mut record);
        record
    };
    let refused = [
        commit(|commit| commit.tags = vec!["17".into()]),
        commit(|commit| commit.tags = vec!["x".into(); 65_536]),
        commit(|commit| commit.notes = vec![("x".repeat(256), String::new())]),
        commit(|commit| commit.message = "x".repeat(1 << 24)),
        commit(|commit| commit.packs = vec![([0; 16], 0); 1 << 20]),
        commit(|commit| commit.parent = vectors::SEQ),
        commit(|commit| commit.origin = Some(("a/b".into(), 1))),
        record(Body::Tag { epoch: vectors::SEQ, name: "x".into() }),
        record(Body::Tag { epoch: 0, name: "x".into() }),
        record(Body::Untag { name: "latest".into() }),
        record(Body::Drop { epochs: vec![2, 1] }),
        record(Body::Drop { epochs: vec![1, 1] }),
        with(|record| record.owner.as_mut().unwrap().name = "x".repeat(256)),
        with(|record| record.machine = "x".repeat(300).into()),
        with(|record| record.latest_epoch = vectors::SEQ),
        with(|record| record.last_edit = vectors::SEQ),
        with(|record| (record.seq, record.latest_epoch, record.last_edit) = (0, 0, 0)),
        with(|record| record.previous = [0; 32]),
        with(|record| (record.seq, record.latest_epoch, record.last_edit) = (1, 0, 0)),
    ];
    for record in refused {
        let text: String = format!("{record:?}").chars().take(400).collect();
        assert!(record.check().is_err(), "{text}");
    }
    for (name, record) in vectors::records() {
        assert_eq!(record.check(), Ok(()), "{name}");
    }
    assert_eq!(commit(|commit| commit.message = "x".repeat(1 << 20)).check(), Ok(()));
}

#[test]
fn an_editor_that_saw_many_objects_does_not_mix_them_up() {
    let object = |number: u32| ObjectRef::Record { machine: "web1".into(), seq: u64::from(number) + 1 };
    let mut editor = NodeEditor::of(&Node::empty(0));
    for number in 0..70_000_u32 {
        editor.set(number as usize % 512, [0; 32], &place(object(number), 64, 9));
    }
    let node = editor.finish();
    assert_eq!(node.objects().len(), 512);
    for slot in node.iter() {
        let last = (0..70_000_u32).rev().find(|number| *number as usize % 512 == slot.slot).unwrap();
        assert_eq!(*slot.object, object(last), "slot {}", slot.slot);
    }
    let (mut bytes, own) = (Vec::new(), vectors::pack());
    node.put_whole(Some(&own), &mut bytes);
    assert!(matches!(decode_node(&bytes, &own), Ok(StoredNode::Whole(_))));
}

#[test]
fn a_patch_takes_its_slots_in_any_order() {
    let (own, base) = (vectors::pack(), vectors::patch_base());
    let (mut sorted, mut shuffled) = (Vec::new(), Vec::new());
    vectors::patched().put_patch(&base, &[1, 2, 511], Some(&own), &mut sorted);
    vectors::patched().put_patch(&base, &[511, 1, 2, 1], Some(&own), &mut shuffled);
    assert_eq!(sorted, shuffled);
}
