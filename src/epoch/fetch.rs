//! Fetching many pages: neighbours in one read, each page proven against its hash.

use std::ops::Range;
use std::slice;

use epochfs_format::{Block, BlockKind, Hash, PAGE_SIZE, Page, PageDecoder, Place, hash_pages};

use super::nodes::describe;
use crate::error::{Error, Kind, Result};
use crate::repo::Objects;

/// Blocks closer together than this are fetched in one read.
const BRIDGED_GAP_LEN: u64 = 64 << 10;

/// Where many reads of a store that is far away are on their way together, so many more of a hundred cost nearly nothing: the
/// widest gaps are not read then.
const MORE_READS_PERCENT: usize = 25;

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
        let mut groups = Vec::new();
        let bridged = if objects.store().is_remote() { bridged_gap(wanted) } else { BRIDGED_GAP_LEN };
        let mut rest = wanted;
        while let Some(next) = rest.first() {
            let start = u64::from(next.place.offset);
            let mut end = start + u64::from(next.place.len);
            let count = rest
                .iter()
                .take_while(|other| {
                    let other_start = u64::from(other.place.offset);
                    let other_end = other_start + u64::from(other.place.len);
                    let near = other.place.object == next.place.object
                        && other_start <= end + bridged
                        && other_end.max(end) - start <= READ_LEN_MAX;
                    if near {
                        end = end.max(other_end);
                    }
                    near
                })
                .count()
                .max(1);
            let (group, behind) = rest.split_at(count);
            rest = behind;
            groups.push((start..end, group));
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

/// The widest gap between pages, in the order in which they lie, that is worth reading.
fn bridged_gap(wanted: &[Wanted]) -> u64 {
    let mut gaps: Vec<u64> = wanted
        .windows(2)
        .filter(|pair| pair[0].place.object == pair[1].place.object)
        .map(|pair| {
            let end = u64::from(pair[0].place.offset) + u64::from(pair[0].place.len);
            u64::from(pair[1].place.offset).saturating_sub(end)
        })
        .filter(|gap| *gap <= BRIDGED_GAP_LEN)
        .collect();
    let fewest = wanted.len() - gaps.len();
    match fewest * MORE_READS_PERCENT / 100 {
        0 => BRIDGED_GAP_LEN,
        more if more < gaps.len() => *gaps.select_nth_unstable_by(more, |a, b| b.cmp(a)).1,
        _ => 0,
    }
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
    fn a_few_more_reads_spare_the_widest_gaps_where_there_are_many_anyway() {
        // One read of all, whatever lies between.
        let mut pages: Vec<_> = [0, 5000, 9000, 60_000].map(|offset| wanted(0, offset)).to_vec();
        assert_eq!(bridged_gap(&pages), BRIDGED_GAP_LEN);
        // Eight reads, so that two gaps are left out: those of 50,000 and 4,000.
        pages.extend((1..8).map(|pack| wanted(pack, 0)));
        assert_eq!(bridged_gap(&pages), 3000);
        // More than there are gaps.
        pages.extend((8..20).map(|pack| wanted(pack, 0)));
        assert_eq!(bridged_gap(&pages), 0);
    }
}
