//! Fetching many pages: neighbours in one read, each page proven against its hash.

use std::ops::Range;
use std::slice;

use epochfs_format::{Block, BlockKind, Hash, PAGE_SIZE, Page, PageDecoder, Place, hash_pages};

use super::nodes::describe;
use crate::error::{Error, Kind, Result};
use crate::repo::Objects;

/// Blocks closer together than this are fetched in one read.
const BRIDGED_GAP_LEN: u64 = 64 << 10;

/// Of a store that is far away, what lies between pages and is read with them is at most one in so many bytes of theirs, and so
/// much: reads that are on their way together cost little time, but each costs something.
const BRIDGED_SHARE: u64 = 8;
const BRIDGED_LEN: u64 = 8 << 10;

/// The longest single read.
const READ_LEN_MAX: u64 = 4 << 20;

/// A page that is wanted.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The page's number in its image.
    pub page: u64,
    pub hash: Hash,
    pub place: Place,
}

/// So many pages are hashed together, which is quicker than one by one.
const PROVEN_TOGETHER: usize = 16;

/// Fetches pages. One a thread: it keeps its decoder and its buffers.
#[derive(Default)]
pub struct Fetcher {
    decoder: PageDecoder,
    blocks: Vec<u8>,
    hashes: Vec<Hash>,
}

impl Fetcher {
    /// Puts every wanted page in its place in `pages`, the first of which has the number `first`. Each is proven;
    /// after an error `pages` holds nothing useful.
    pub fn fetch(&mut self, objects: &Objects, mut wanted: Vec<Wanted>, first: u64, pages: &mut [Page]) -> Result<()> {
        wanted.sort_by(|a, b| (&a.place.object, a.place.offset).cmp(&(&b.place.object, b.place.offset)));
        // A guest has some pages many times over: such a one is decoded and proven once.
        let mut copies = Vec::new();
        wanted.dedup_by(|again, once| {
            let is_copy = again.place == once.place && again.hash == once.hash;
            if is_copy {
                copies.push((once.page, again.page));
            }
            is_copy
        });
        self.fetch_each(objects, &wanted, first, pages)?;
        for (once, again) in copies {
            let from = (once - first) as usize;
            pages.copy_within(from..from + 1, (again - first) as usize);
        }
        Ok(())
    }

    /// Fetches pages that are in the order in which they lie.
    fn fetch_each(&mut self, objects: &Objects, wanted: &[Wanted], first: u64, pages: &mut [Page]) -> Result<()> {
        let is_bridged = bridged(wanted, objects.store().is_remote());
        let mut groups = Vec::new();
        let mut rest = 0..wanted.len();
        while let Some(next) = wanted[rest.clone()].first() {
            let start = u64::from(next.place.offset);
            let mut end = next.place.range().end;
            let mut behind = rest.start + 1;
            while behind < rest.end && is_bridged[behind - 1] {
                let with_it = wanted[behind].place.range().end.max(end);
                if with_it - start > READ_LEN_MAX {
                    break;
                }
                (end, behind) = (with_it, behind + 1);
            }
            groups.push((start..end, &wanted[rest.start..behind]));
            rest.start = behind;
        }
        if groups.len() > 1 {
            // All at once, instead of one after the other.
            groups.iter().for_each(|(range, group)| objects.will_need(&group[0].place.object, range.clone()));
        }
        groups.into_iter().try_for_each(|(range, group)| self.fetch_group(objects, range, group, first, pages))
    }

    /// Fetches pages whose blocks all lie in this range of one object.
    fn fetch_group(
        &mut self,
        objects: &Objects,
        range: Range<u64>,
        group: &[Wanted],
        first: u64,
        pages: &mut [Page],
    ) -> Result<()> {
        let outside = |_| Error::damaged("a page's place lies past the end of any object");
        let offset = u32::try_from(range.start).map_err(outside)?;
        let len = u32::try_from(range.end - range.start).map_err(outside)? as usize;
        if self.blocks.len() < len {
            self.blocks.resize(len, 0);
        }
        match objects.read_into(&group[0].place.object, offset, &mut self.blocks[..len]) {
            Ok(()) => match self.decode_group(group, offset, first, pages) {
                Err(error) if error.kind() == Kind::Damaged && objects.distrust(&group[0].place.object) => {
                    objects.read_into(&group[0].place.object, offset, &mut self.blocks[..len])?;
                    self.decode_group(group, offset, first, pages)
                }
                decoded => decoded,
            },
            // What cannot be read may lie between the pages: each is tried alone.
            Err(error) if group.len() > 1 && error.kind() != Kind::Unavailable => group.iter().try_for_each(|one| {
                let start = u64::from(one.place.offset);
                self.fetch_group(objects, start..start + u64::from(one.place.len), slice::from_ref(one), first, pages)
            }),
            Err(error) => Err(error),
        }
    }

    fn decode_group(&mut self, group: &[Wanted], offset: u32, first: u64, pages: &mut [Page]) -> Result<()> {
        group.chunks(PROVEN_TOGETHER).try_for_each(|some| self.decode(some, offset, first, pages))
    }

    /// Decodes pages from blocks that were read from `offset` on, and proves them.
    fn decode(&mut self, some: &[Wanted], offset: u32, first: u64, pages: &mut [Page]) -> Result<()> {
        let slot = |wanted: &Wanted| (wanted.page - first) as usize;
        for wanted in some {
            let block = &self.blocks[(wanted.place.offset - offset) as usize..][..wanted.place.len as usize];
            Block::only(block, BlockKind::Page)
                .and_then(|block| self.decoder.decode_unproven(block, &mut pages[slot(wanted)]))
                .map_err(|error| Error::from(error).context(describe(&wanted.place)))?;
        }
        let mut decoded = [&ZERO_PAGE; PROVEN_TOGETHER];
        for (page, wanted) in decoded.iter_mut().zip(some) {
            *page = &pages[slot(wanted)];
        }
        hash_pages(&decoded[..some.len()], &mut self.hashes);
        match some.iter().zip(&self.hashes).find(|(wanted, hash)| wanted.hash != **hash) {
            None => Ok(()),
            Some((wanted, _)) => {
                Err(Error::damaged("the page there has another hash").context(describe(&wanted.place)))
            }
        }
    }
}

/// Of pages in the order in which they lie, whether each is read together with the next, and with what lies between.
fn bridged(wanted: &[Wanted], is_remote: bool) -> Vec<bool> {
    let gap = |pair: &[Wanted]| match pair[0].place.object == pair[1].place.object {
        true => Some(pair[1].place.range().start.saturating_sub(pair[0].place.range().end)),
        false => None,
    };
    let gaps = wanted.windows(2).map(|pair| gap(pair).filter(|gap| *gap <= BRIDGED_GAP_LEN));
    if !is_remote {
        return gaps.map(|gap| gap.is_some()).collect();
    }
    let mut gaps: Vec<(u64, usize)> = gaps.enumerate().filter_map(|(at, gap)| Some((gap?, at))).collect();
    gaps.sort_unstable();
    let mut is_bridged = vec![false; wanted.len().saturating_sub(1)];
    let mut left = wanted.iter().map(|wanted| u64::from(wanted.place.len)).sum::<u64>() / BRIDGED_SHARE + BRIDGED_LEN;
    for (gap, at) in gaps {
        let Some(less) = left.checked_sub(gap) else { break };
        (left, is_bridged[at]) = (less, true);
    }
    is_bridged
}

const ZERO_PAGE: Page = [0; PAGE_SIZE];

#[cfg(test)]
mod tests {
    use epochfs_format::ObjectRef;

    use super::*;

    fn wanted(pack: u8, offset: u32) -> Wanted {
        let place = Place { object: ObjectRef::Pack([pack; 16]), offset, len: 1000 };
        Wanted { page: 0, hash: [0; 32], place }
    }

    #[test]
    fn of_a_store_that_is_far_away_little_is_read_that_nobody_wants() {
        // One object with gaps of nothing, 4,000, 50,000 and 3,500 bytes, and another.
        let offsets = [0, 1000, 6000, 57_000, 61_500];
        let mut pages: Vec<_> = offsets.map(|offset| wanted(0, offset)).to_vec();
        pages.push(wanted(1, 62_500));
        assert_eq!(bridged(&pages, false), [true, true, true, true, false]);
        // 6,000 / 8 and 8,192 bytes: the two small ones.
        assert_eq!(bridged(&pages, true), [true, true, false, true, false]);
        // Of equal gaps as many as may be.
        let pages: Vec<_> = (0..100).map(|at| wanted(0, at * 4000)).collect();
        assert_eq!(bridged(&pages, true).iter().filter(|is_bridged| **is_bridged).count(), (12_500 + 8192) / 3000);
        assert!(bridged(&[], true).is_empty() && bridged(&pages[..1], true).is_empty());
    }
}
