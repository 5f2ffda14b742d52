//! Fetching many pages: neighbours in one read, each page proven against its hash.

use epochfs_format::{Hash, ObjectRef, PAGE_SIZE, Page, PageDecoder, Place};

use super::nodes::describe;
use crate::error::{Error, Result};
use crate::repo::Objects;

/// Blocks closer together than this are fetched in one read.
const BRIDGED_GAP_LEN: u64 = 64 << 10;

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

/// Fetches pages. One a thread: it keeps its decoder.
#[derive(Default)]
pub struct Fetcher {
    decoder: PageDecoder,
}

impl Fetcher {
    /// Calls `each` with every wanted page, in the order in which they lie.
    ///
    /// A page that cannot be read or proven goes to `each` as the error; what it returns ends the fetch or not.
    pub fn fetch(
        &mut self,
        objects: &Objects,
        wanted: &mut [Wanted],
        each: &mut dyn FnMut(u64, Result<&Page>) -> Result<()>,
    ) -> Result<()> {
        wanted.sort_by(|a, b| (&a.place.object, a.place.offset).cmp(&(&b.place.object, b.place.offset)));
        let mut rest = &*wanted;
        let mut page = [0; PAGE_SIZE];
        while let Some(first) = rest.first() {
            let start = u64::from(first.place.offset);
            let mut end = start + u64::from(first.place.len);
            let count = rest
                .iter()
                .take_while(|next| {
                    let next_start = u64::from(next.place.offset);
                    let next_end = next_start + u64::from(next.place.len);
                    let near = next.place.object == first.place.object
                        && next_start <= end + BRIDGED_GAP_LEN
                        && next_end.max(end) - start <= READ_LEN_MAX;
                    if near {
                        end = end.max(next_end);
                    }
                    near
                })
                .count()
                .max(1);
            let (group, behind) = rest.split_at(count);
            rest = behind;
            self.fetch_group(objects, &first.place.object, start..end, group, &mut page, each)?;
        }
        Ok(())
    }

    fn fetch_group(
        &mut self,
        objects: &Objects,
        object: &ObjectRef,
        range: std::ops::Range<u64>,
        group: &[Wanted],
        page: &mut Page,
        each: &mut dyn FnMut(u64, Result<&Page>) -> Result<()>,
    ) -> Result<()> {
        let bytes = match (u32::try_from(range.start), u32::try_from(range.end - range.start)) {
            (Ok(offset), Ok(len)) => objects.read_range(object, offset, len),
            _ => Err(Error::damaged("a page's place lies past the end of any object")),
        };
        let bytes = match bytes {
            Ok(bytes) => Some(bytes),
            // Of several pages some may be whole: each is tried alone.
            Err(_) if group.len() > 1 => None,
            Err(error) => return each(group[0].page, Err(error)),
        };
        for wanted in group {
            let place = &wanted.place;
            let block = match &bytes {
                Some(bytes) => {
                    Ok(bytes.slice((u64::from(place.offset) - range.start) as usize..).slice(..place.len as usize))
                }
                None => objects.read(place),
            };
            let decoded = block.and_then(|block| {
                self.decoder
                    .decode(&block, &wanted.hash, page)
                    .map_err(|error| Error::from(error).context(describe(place)))
            });
            match decoded {
                Ok(()) => each(wanted.page, Ok(page))?,
                Err(error) => each(wanted.page, Err(error))?,
            }
        }
        Ok(())
    }
}
