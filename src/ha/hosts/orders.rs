//! What operators tell hosts to be there for, and forgetting hosts.

use epochfs_format::{HostObject, HostOrder, HostPurpose, host_order_key, host_prefix, parse_host_key};

use crate::error::{Error, Kind, Result};
use crate::platform::clock::now_ns;
use crate::platform::store::{Put, Store, keys_below};

/// How often another order may come first.
const TRIES: u32 = 8;

fn numbers(store: &dyn Store, host: &[u8; 16]) -> Result<Vec<u64>> {
    let keys = keys_below(store, &host_prefix(host))?;
    let number = |key: &String| match parse_host_key(key)? {
        (_, HostObject::Order(number)) => Some(number),
        (_, HostObject::Heartbeat(_)) => None,
    };
    Ok(keys.iter().filter_map(number).collect())
}

/// The newest order to a host.
pub fn newest_order(store: &dyn Store, repository: &[u8; 16], host: &[u8; 16]) -> Result<Option<HostOrder>> {
    match numbers(store, host)?.last() {
        Some(number) => read_order(store, repository, host, *number),
        None => Ok(None),
    }
}

/// An order, unless it was replaced meanwhile.
pub(super) fn read_order(
    store: &dyn Store,
    repository: &[u8; 16],
    host: &[u8; 16],
    number: u64,
) -> Result<Option<HostOrder>> {
    let key = host_order_key(host, number);
    let order = match store.get(&key) {
        Ok(bytes) => HostOrder::decode(&bytes, repository).map_err(|error| Error::from(error).context(&key))?,
        Err(error) if error.kind() == Kind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match order.host == *host && order.number == number {
        true => Ok(Some(order)),
        false => Err(Error::damaged(format!("{key} holds an order to another host, or of another number"))),
    }
}

/// Tells a host what it is there for.
pub fn order(
    store: &dyn Store,
    repository: &[u8; 16],
    host: &[u8; 16],
    purpose: HostPurpose,
    by: &str,
) -> Result<HostOrder> {
    for _ in 0..TRIES {
        let before = numbers(store, host)?;
        let number = before.last().map_or(1, |last| last + 1);
        let (repository, host, by) = (*repository, *host, by.to_owned());
        let order = HostOrder { repository, host, number, purpose, time_ns: now_ns(), by };
        let put = store.put_if_absent(&host_order_key(&host, number), &[&order.encode()])?;
        // Its own try, repeated by the store, is in its way: then the order is given.
        if put == Put::Created || read_order(store, &repository, &host, number)?.as_ref() == Some(&order) {
            for old in before {
                store.delete(&host_order_key(&host, old))?;
            }
            return Ok(order);
        }
    }
    Err(Error::conflict("others tell this host something else at the same time").hint("repeat it"))
}

/// Forgets a host that is no more: its heartbeats and what it was told. Returns how many objects those were.
pub fn forget_host(store: &dyn Store, host: &[u8; 16]) -> Result<usize> {
    let keys = keys_below(store, &host_prefix(host))?;
    keys.iter().try_for_each(|key| store.delete(key))?;
    Ok(keys.len())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::platform::files::SimFiles;
    use crate::platform::store::LocalStore;
    use crate::platform::store::faulty::{Fault, FaultyStore, Rates};

    #[test]
    fn the_newest_order_counts_also_where_the_store_repeats_itself() {
        let local = LocalStore::create(Path::new("/one"), Arc::new(SimFiles::new(0))).unwrap();
        let store = FaultyStore::new(Arc::new(local), 0, Rates::default());
        let (repository, host) = ([1; 16], [7; 16]);
        assert_eq!(newest_order(&store, &repository, &host).unwrap(), None);
        order(&store, &repository, &host, HostPurpose::Draining, "a").unwrap();
        // A listing comes first.
        store.plan(store.calls() + 1, Fault::ExistsAfter);
        let told = order(&store, &repository, &host, HostPurpose::Maintenance, "b").unwrap();
        assert_eq!((told.number, told.purpose), (2, HostPurpose::Maintenance));
        assert_eq!(newest_order(&store, &repository, &host).unwrap(), Some(told));
        assert_eq!(forget_host(&store, &host).unwrap(), 1);
        assert_eq!(newest_order(&store, &repository, &host).unwrap(), None);
    }
}
