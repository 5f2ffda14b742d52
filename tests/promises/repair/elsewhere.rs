//! Repairs from what is not the same object: pages that lie in other packs, and repositories that `copy` filled.

use std::sync::Arc;

use bytes::Bytes;
use epochfs::epoch::CommitOptions;
use epochfs_format::{BlockKind, PAGE_SIZE, Page, PageEncoder, hash_page};

use super::{damaged, footer, judge, lasting, repair, repaired, sources};
use crate::crash::noisy_image;
use crate::support::image::{Image, LEAF, PAGE};
use crate::support::memory::{MemoryStore, ObjectMap};
use crate::support::{commit, compare, create, latest, memory, open, options};

/// Two leaves below an inner node: pages that compress and some that do not.
fn image() -> Image {
    let mut image = noisy_image(7, 20);
    image.resize(LEAF + 30 * PAGE);
    for number in 0..30 {
        image.write(LEAF + number * PAGE, &[number as u8 + 1; 1000]);
        image.write(LEAF + number * PAGE + 2000, b"a page that compresses");
    }
    image
}

/// A repository with a machine that was committed twice, of which little is shared: packs, since records carry less.
pub fn repository() -> ObjectMap {
    let store = MemoryStore::default();
    let epochs = create(store.clone());
    let no_records = CommitOptions { inline_len_max: Some(0), ..options() };
    let mut image = image();
    commit(&epochs, "web1", &memory(&image), no_records.clone()).unwrap();
    image.write(3 * PAGE, b"changed");
    image.write(LEAF + 9 * PAGE, b"changed as well");
    commit(&epochs, "web1", &memory(&image), no_records).unwrap();
    store.objects()
}

/// What `copy` makes of it in another repository, where blocks, packs and places are others.
fn copied(objects: &ObjectMap) -> ObjectMap {
    let from = open(MemoryStore::of(objects.clone())).unwrap();
    let store = MemoryStore::default();
    // Another machine first, with other pages: nothing lies where it lies in the original.
    let to = create(store.clone());
    commit(&to, "other", &memory(&noisy_image(99, 3)), options()).unwrap();
    from.copy_epochs(&"web1".into(), None, &to, "web1", &mut |_, _| {}).unwrap();
    store.objects()
}

/// Every damaged page and every damaged node is made again, byte for byte, from a copy that has none of the same objects.
#[test]
fn p5_pages_and_nodes_are_repaired_from_a_repository_that_copy_filled() {
    let objects = repository();
    let copy = copied(&objects);
    let mut counts = [0, 0, 0];
    for (key, bytes) in objects.iter().filter(|(key, _)| key.starts_with("packs/")) {
        for (what, wrong) in damaged(bytes) {
            let mut before = objects.clone();
            before.insert(key.clone(), wrong.into());
            let (after, repaired) = repaired(before.clone(), std::slice::from_ref(&copy)).unwrap();
            judge(&objects, &before, &after).unwrap_or_else(|wrong| panic!("{what} of {key}: {wrong}"));
            let is_back = lasting(&after) == lasting(&objects);
            // Of a node nothing but its own bytes tells which places it named; zeros tell nothing.
            let is_hopeless = what.starts_with("zeros") && (what.ends_with("Node") || what.ends_with("Patch"))
                || what.ends_with("Patch") && !what.starts_with("a flipped bit");
            assert!(is_back || is_hopeless, "{what} of {key}: {:?}", repaired.lost);
            for (count, kind) in counts.iter_mut().zip(["Page", "Node", "Patch"]) {
                *count += usize::from(is_back && what.ends_with(kind));
            }
        }
    }
    eprintln!("pages, nodes and patches repaired: {counts:?}");
    assert!(counts[0] > 100 && counts[1] >= 6, "{counts:?}");
}

/// Without an index, the same pages of two machines lie in packs of their own.
#[test]
fn p5_a_page_is_repaired_from_another_pack_of_the_repository_however_it_was_compressed_there() {
    let store = MemoryStore::default();
    let epochs = create(store.clone());
    let levels = |level| CommitOptions { compression_level: level, inline_len_max: Some(0), ..options() };
    commit(&epochs, "web1", &memory(&image()), levels(1)).unwrap();
    commit(&epochs, "web2", &memory(&image()), levels(19)).unwrap();
    let objects = store.objects();
    let mut pages = 0;
    for (key, bytes) in objects.iter().filter(|(key, _)| key.starts_with("packs/")) {
        let (_, footer) = footer(bytes);
        for entry in footer.iter().filter(|entry| entry.kind == BlockKind::Page) {
            let mut wrong = bytes.to_vec();
            wrong[entry.offset as usize + 8..(entry.offset + entry.len) as usize].fill(0xa5);
            let mut before = objects.clone();
            before.insert(key.clone(), wrong.into());
            let (after, repaired) = repaired(before, &[]).unwrap();
            assert_eq!(lasting(&after), lasting(&objects), "{key} at {}: {:?}", entry.offset, repaired.lost);
            assert!(repaired.repaired_blocks[0].from.contains("another place"));
            pages += 1;
        }
    }
    assert!(pages >= 100, "{pages}");
}

/// Where the head of the block is damaged, too, nothing tells how the page was compressed: any block as long will do.
#[test]
fn p5_a_page_of_which_nothing_is_left_is_the_same_page_at_the_same_place() {
    let objects = repository();
    let copy = copied(&objects);
    for (key, bytes) in objects.iter().filter(|(key, _)| key.starts_with("packs/")) {
        let (_, footer) = footer(bytes);
        let mut wrong = bytes.to_vec();
        for entry in footer.iter().filter(|entry| entry.kind == BlockKind::Page) {
            wrong[entry.offset as usize..(entry.offset + entry.len) as usize].fill(0);
        }
        let mut before = objects.clone();
        before.insert(key.clone(), Bytes::from(wrong));
        let memory_store = MemoryStore::of(before);
        let store = open(memory_store.clone()).unwrap();
        let repaired = repair(&store, &sources(std::slice::from_ref(&copy))).unwrap();
        assert!(repaired.left.is_whole(), "{key}: {:?}", repaired.lost);
        let epoch = open(memory_store).unwrap().epoch(&latest("web1")).unwrap();
        let mut expected = image();
        expected.write(3 * PAGE, b"changed");
        expected.write(LEAF + 9 * PAGE, b"changed as well");
        compare(&epoch, &memory(&expected)).unwrap();
    }
}

/// Any level that a writer may have used is found again.
#[test]
fn pages_of_any_level_are_compressed_again_to_what_they_were() {
    let store = MemoryStore::default();
    let epochs = create(store.clone());
    let other = create(MemoryStore::default());
    let plain = noisy_image(5, 1).page(0);
    let mut image = Image::zeros(24 * PAGE);
    for number in 0..24_u64 {
        let mut page = plain;
        page[1500 + 50 * number as usize..].iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 16) as u8);
        image.put_page(number, page);
    }
    for level in [-5, -1, 1, 3, 7, 12, 19, 22] {
        let options = CommitOptions { compression_level: level, inline_len_max: Some(0), ..options() };
        let machine: Arc<str> = format!("level{level}").as_str().into();
        commit(&epochs, &machine, &memory(&image), options).unwrap();
    }
    commit(&other, "web1", &memory(&image), CommitOptions { inline_len_max: Some(0), ..options() }).unwrap();
    let objects = store.objects();
    let mut encoder = PageEncoder::new(19);
    let mut lens = std::collections::BTreeSet::new();
    for (key, bytes) in objects.iter().filter(|(key, _)| key.starts_with("packs/")) {
        let (_, footer) = footer(bytes);
        let entry = footer.iter().find(|entry| entry.kind == BlockKind::Page).unwrap();
        lens.insert(entry.len);
        let mut wrong = bytes.to_vec();
        wrong[entry.offset as usize + 100..entry.offset as usize + 120].fill(0xee);
        let mut before = objects.clone();
        before.insert(key.clone(), wrong.into());
        let (after, _) = repaired(before, &[]).unwrap();
        assert_eq!(lasting(&after), lasting(&objects), "{key}");
    }
    let page: Page = image.page(0);
    assert_eq!(encoder.put(&page, &mut Vec::new()) as usize % PAGE_SIZE, *lens.first().unwrap() as usize % PAGE_SIZE);
    assert!(lens.len() > 1, "levels make a difference: {lens:?} of {:?}", &hash_page(&page)[..2]);
}
