//! The process that serves, and that another one takes the place of when it dies.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::channel::{Channel, FromWorker, Ready, ToWorker};
use super::descriptor::Userfaultfd;
use super::image::Image;
use super::ledger::Ledger;
use super::offload::{Offload, Served};
use super::peer::Peer;
use super::server::{Options, Server};
use super::vm::Admission;
use crate::error::{Error, Result};

/// How often a worker that lost its supervisor looks whether it is still needed.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often a worker says that it is alive.
pub(super) const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// Says that this process is not stopped, for as long as somebody hears it.
fn say_alive(channel: &Arc<Channel>) -> Result<()> {
    let channel = channel.clone();
    std::thread::Builder::new()
        .name("alive".into())
        .spawn(move || {
            while channel.send(&FromWorker::Alive, &[]).is_ok() {
                std::thread::sleep(ALIVE_EVERY);
            }
        })
        .map(drop)
        .map_err(|error| Error::io("cannot start a thread", error))
}

/// Serves whom the supervisor hands over, until it says no more. `orphaned` is told every second how many VMs are left once
/// the supervisor is gone.
pub fn work(
    channel: Channel,
    ready: Ready,
    image: Image,
    mut options: Options,
    orphaned: &mut dyn FnMut(usize),
) -> Result<()> {
    let channel = Arc::new(channel);
    let teller = channel.clone();
    options.ended = Some(Arc::new(move |id, end| {
        // A supervisor that is gone needs to know nothing.
        if let Err(error) = teller.send(&FromWorker::Ended { id, end }, &[]) {
            tracing::debug!(%error, "nobody hears of the end of a VM");
        }
    }));
    let server = Server::new(image, options)?;
    channel.send(&FromWorker::Ready(ready), &[])?;
    say_alive(&channel)?;
    while let Some((message, descriptors)) = channel.receive::<ToWorker>()? {
        match message {
            ToWorker::Serve { id, pid, layout } => {
                let [uffd, process, ledger] = <[_; 3]>::try_from(descriptors)
                    .map_err(|_| Error::usage("a VM was handed over without its descriptors"))?;
                let admission = Admission {
                    layout,
                    uffd: Userfaultfd::adopted(uffd),
                    peer: Peer::found(pid, process),
                    ledger: Ledger::of(ledger),
                    connection: None,
                };
                if let Err(error) = server.serve(id, admission) {
                    tracing::error!("process {pid} cannot be served: {error}");
                    channel.send(&FromWorker::Ended { id, end: super::vm::End::Killed }, &[])?;
                }
            }
            ToWorker::Finish => server.finish(),
        }
    }
    // A VM that has just ended may not be noticed yet.
    if !server.wait(LOOK_EVERY) {
        tracing::error!(
            "the supervisor died: VMs are served until they end, but nobody would take this process's place"
        );
        while !server.wait(LOOK_EVERY) {
            orphaned(server.vms().len());
        }
    }
    Ok(())
}

/// Restores one VM into a monitor that does not hand its memory over. It ends with this process, if that dies.
pub fn offload(
    channel: &Arc<Channel>,
    ready: Ready,
    vm: &Offload,
    socket: &Path,
    is_resumed: bool,
    options: &Options,
) -> Result<Served> {
    channel.send(&FromWorker::Ready(ready), &[])?;
    say_alive(channel)?;
    let served = vm.serve(socket, is_resumed, options, &mut |peer| {
        channel.send(&FromWorker::Watch { pid: peer.pid() }, &[peer.as_fd()])
    });
    served.inspect_err(|error| {
        if let Err(error) = channel.send(&FromWorker::failed(error), &[]) {
            tracing::debug!(%error, "nobody hears of the failure");
        }
    })
}
