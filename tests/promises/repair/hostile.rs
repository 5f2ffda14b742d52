//! Copies that lie: nothing is taken that hashes, digests and links do not prove.

use bytes::Bytes;
use epochfs_format::{BlockKind, FooterBuilder, ObjectRef, PageEncoder, encode_header, parse_id, record_key};

use super::{damaged, footer, judge, lasting, repaired};
use crate::crash::noisy_image;
use crate::flips::repository::sample;
use crate::support::memory::{MemoryStore, ObjectMap};
use crate::support::{commit, create, memory, open, options};

/// Each object of a copy is replaced by something else that is sound by itself; what is damaged here is not taken from it.
#[test]
fn p5_nothing_is_taken_from_a_copy_that_holds_other_objects() {
    let sample = sample();
    let other = crate::flips::repository::sample();
    // The same names with the other repository's objects, one for one, under this repository's descriptor.
    let mut liar: ObjectMap = sample.objects.clone();
    let theirs: Vec<&Bytes> =
        other.objects.iter().filter(|(key, _)| key.starts_with("packs/")).map(|(_, bytes)| bytes).collect();
    for (at, key) in sample.objects.keys().filter(|key| key.starts_with("packs/")).enumerate() {
        liar.insert(key.clone(), theirs[at % theirs.len()].clone());
    }
    for (key, bytes) in other.objects.iter().filter(|(key, _)| key.contains("/log/")) {
        liar.insert(key.clone(), bytes.clone());
    }
    check_against(&sample.objects, &liar);
}

/// A pack of the same name and form, in which every page is another one: its checksums and its own hashes fit.
#[test]
fn p5_nothing_is_taken_from_a_copy_whose_pages_are_others() {
    // Pages that do not compress are all as long as each other.
    let objects = super::elsewhere::repository();
    let repository = *open(MemoryStore::of(objects.clone())).unwrap().repository().id();
    let mut liar = objects.clone();
    for (key, bytes) in objects.iter().filter(|(key, _)| key.starts_with("packs/")) {
        let object = ObjectRef::Pack(parse_id(key.rsplit('/').next().unwrap()).unwrap());
        let mut made = encode_header(&repository, &object).to_vec();
        let mut builder = FooterBuilder::new();
        for entry in footer(bytes).1.iter() {
            let block = &bytes[entry.offset as usize..(entry.offset + entry.len) as usize];
            let mut other = Vec::new();
            if entry.kind == BlockKind::Page {
                PageEncoder::new(-1).put(&noisy_image(u64::from(entry.offset), 1).page(0), &mut other);
            }
            let block = if other.len() == block.len() { other.as_slice() } else { block };
            made.extend_from_slice(block);
            builder.push(entry.kind, entry.hash, block.len() as u32);
        }
        made.extend_from_slice(&builder.finish());
        liar.insert(key.clone(), made.into());
    }
    check_against(&objects, &liar);
}

/// The copy went on by itself: from some record on its log is another one, in the same repository's name.
#[test]
fn p5_a_record_of_a_copy_that_went_another_way_is_not_taken() {
    let build = |second: u64| {
        let store = MemoryStore::default();
        let epochs = create(store.clone());
        commit(&epochs, "web1", &memory(&noisy_image(1, 2)), options()).unwrap();
        let common = store.objects();
        (common, second)
    };
    let (common, _) = build(0);
    let went_on = |seed: u64| {
        let store = MemoryStore::of(common.clone());
        let epochs = open(store.clone()).unwrap();
        for step in 0..3 {
            commit(&epochs, "web1", &memory(&noisy_image(seed + step, 2)), options()).unwrap();
        }
        store.objects()
    };
    let (ours, theirs) = (went_on(10), went_on(20));
    for seq in 2..=4 {
        let key = record_key("web1", seq);
        assert_ne!(ours[&key], theirs[&key]);
        for (what, wrong) in damaged(&ours[&key]) {
            let mut before = ours.clone();
            before.insert(key.clone(), wrong.into());
            let (after, _) = repaired(before.clone(), std::slice::from_ref(&theirs)).unwrap();
            judge(&ours, &before, &after).unwrap_or_else(|wrong| panic!("{what} of record {seq}: {wrong}"));
        }
        let mut before = ours.clone();
        before.remove(&key);
        let (after, _) = repaired(before, std::slice::from_ref(&theirs)).unwrap();
        assert_ne!(after.get(&key), Some(&theirs[&key]), "record {seq} of another log");
    }
}

/// Damage in every part of every pack and record, with a copy that is no help and must do no harm.
fn check_against(objects: &ObjectMap, liar: &ObjectMap) {
    let mut told = 0;
    for (key, bytes) in objects.iter().filter(|(key, _)| key.starts_with("packs/") || key.contains("/log/")) {
        for (what, wrong) in damaged(bytes).into_iter().filter(|(what, _)| !what.starts_with("a flipped bit")) {
            let mut before = objects.clone();
            before.insert(key.clone(), wrong.into());
            let (after, repaired) = repaired(before.clone(), std::slice::from_ref(liar)).unwrap();
            judge(objects, &before, &after).unwrap_or_else(|wrong| panic!("{what} of {key}: {wrong}"));
            let is_back = lasting(&after) == lasting(objects);
            assert!(is_back || !repaired.left.is_whole(), "{what} of {key}: it is called whole");
            told += usize::from(!is_back);
        }
    }
    assert!(told > 0, "everything was repaired, by the liar or without it");
}
