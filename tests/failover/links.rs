//! Hosts with networks of their own: a namespace each, and a link to a hub, in which a service is reached. A link is cut so that
//! packets are lost, both ways or one, and nobody is told.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use crate::asked::skip;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The way back and the way there are lost in a link's own address table: this is nobody's.
const NOBODY: &str = "02:00:00:00:00:99";

/// The port at which the hub stands for the service.
const PORT: u16 = 8000;

/// How long somebody waits at most until he looks whether he is to end.
const LOOK: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// What the host sends is lost.
    Requests,
    /// What is sent to the host is lost.
    Answers,
    Both,
    /// The cable is out, which the host sees.
    Cable,
}

/// How much later what each host sends arrives, in milliseconds.
type Delays = Arc<Mutex<BTreeMap<IpAddr, Arc<AtomicU64>>>>;

/// A hub, and the links to it.
pub struct Hub {
    namespace: String,
    number: u64,
    ends: Arc<AtomicBool>,
    delays: Delays,
}

/// One host's link.
pub struct Link {
    hub: String,
    pub namespace: String,
    /// The link's ends have this name, in the hub and in the host.
    device: String,
    /// The hub, as the host knows it.
    address: Ipv4Addr,
    own: Ipv4Addr,
    delay_ms: Arc<AtomicU64>,
}

/// Whether networks can be made here; says so loudly if not.
pub fn has_links(test: &str) -> bool {
    let name = format!("efs-{}-try", std::process::id());
    let made = Command::new("ip").args(["netns", "add", &name]).output().is_ok_and(|made| made.status.success());
    match made {
        true => drop(ip(&["netns", "del", &name])),
        false => skip(test, "no networks can be made here, which takes root and `ip netns`"),
    }
    made
}

#[track_caller]
fn ip(words: &[&str]) -> String {
    let done = Command::new("ip").args(words).output().unwrap();
    assert!(done.status.success(), "ip {}: {}", words.join(" "), String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

impl Hub {
    /// A hub that stands for a service on this machine's loopback.
    pub fn new(service: SocketAddr) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("efs-{}-{number}", std::process::id());
        ip(&["netns", "add", &namespace]);
        ip(&["-n", &namespace, "link", "set", "lo", "up"]);
        let hub = Self { namespace, number, ends: Arc::default(), delays: Delays::default() };
        hub.listen(service);
        hub
    }

    /// Accepts connections in the hub, and passes them on from outside of it.
    fn listen(&self, service: SocketAddr) {
        let (said, accepted) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let (path, ends) = (format!("/run/netns/{}", self.namespace), self.ends.clone());
        std::thread::spawn(move || {
            let namespace = File::open(path).unwrap();
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
            listener.set_nonblocking(true).unwrap();
            ready.send(()).unwrap();
            while !ends.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, from)) => said.send((stream, from)).unwrap(),
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        is_ready.recv().unwrap();
        let (ends, delays) = (self.ends.clone(), self.delays.clone());
        std::thread::spawn(move || {
            for (stream, from) in accepted {
                let delay = delays.lock().unwrap().get(&from.ip()).cloned().unwrap_or_default();
                let (ends, upstream) = (ends.clone(), TcpStream::connect(service));
                if let (Ok(upstream), Ok(())) = (upstream, stream.set_nonblocking(false)) {
                    pass(&stream, &upstream, &ends, &delay);
                    pass(&upstream, &stream, &ends, &Arc::default());
                }
            }
        });
    }

    /// A link to a host of its own.
    pub fn link(&self, host: &str) -> Link {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let at = NEXT.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("{}-{host}", self.namespace);
        let device = format!("{host}{}", self.number);
        // A network of four addresses each, of those that are there for tests of networks.
        let base = u32::from(Ipv4Addr::new(198, 18, 0, 0)) + (at as u32 % 0x7000) * 4;
        let (address, own) = (Ipv4Addr::from(base + 1), Ipv4Addr::from(base + 2));
        ip(&["netns", "add", &namespace]);
        ip(&[
            "link",
            "add",
            "name",
            &device,
            "netns",
            &self.namespace,
            "type",
            "veth",
            "peer",
            "name",
            &device,
            "netns",
            &namespace,
        ]);
        for (within, address) in [(&self.namespace, address), (&namespace, own)] {
            ip(&["-n", within, "address", "add", &format!("{address}/30"), "dev", &device]);
            ip(&["-n", within, "link", "set", &device, "up"]);
        }
        ip(&["-n", &namespace, "link", "set", "lo", "up"]);
        let delay_ms = Arc::<AtomicU64>::default();
        self.delays.lock().unwrap().insert(own.into(), delay_ms.clone());
        Link { hub: self.namespace.clone(), namespace, device, address, own, delay_ms }
    }
}

/// Passes on what comes, in a thread of its own.
fn pass(from: &TcpStream, to: &TcpStream, ends: &Arc<AtomicBool>, delay_ms: &Arc<AtomicU64>) {
    let (Ok(mut from), Ok(mut to)) = (from.try_clone(), to.try_clone()) else { return };
    let (ends, delay_ms) = (ends.clone(), delay_ms.clone());
    std::thread::spawn(move || {
        let _ = from.set_read_timeout(Some(LOOK));
        let mut buffer = vec![0; 64 << 10];
        while !ends.load(Ordering::Relaxed) {
            match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(len) => {
                    std::thread::sleep(Duration::from_millis(delay_ms.load(Ordering::Relaxed)));
                    if to.write_all(&buffer[..len]).is_err() {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
        }
        let _ = (to.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
    });
}

impl Link {
    /// Where the host reaches the service.
    pub fn endpoint(&self) -> String {
        format!("http://{}:{PORT}", self.address)
    }

    pub fn cut(&self, way: Way) {
        if matches!(way, Way::Requests | Way::Both) {
            self.neighbour(&self.namespace, self.address, true);
        }
        if matches!(way, Way::Answers | Way::Both) {
            self.neighbour(&self.hub, self.own, true);
        }
        if way == Way::Cable {
            ip(&["-n", &self.hub, "link", "set", &self.device, "down"]);
        }
    }

    /// Takes all cuts and delays back.
    pub fn heal(&self) {
        self.delay(Duration::ZERO);
        ip(&["-n", &self.hub, "link", "set", &self.device, "up"]);
        self.neighbour(&self.namespace, self.address, false);
        self.neighbour(&self.hub, self.own, false);
    }

    /// What the host sends arrives so much later.
    pub fn delay(&self, delay: Duration) {
        self.delay_ms.store(delay.as_millis() as u64, Ordering::Relaxed);
    }

    fn neighbour(&self, within: &str, address: Ipv4Addr, is_lost: bool) {
        let address = address.to_string();
        match is_lost {
            true => {
                ip(&[
                    "-n",
                    within,
                    "neighbour",
                    "replace",
                    &address,
                    "lladdr",
                    NOBODY,
                    "dev",
                    &self.device,
                    "nud",
                    "permanent",
                ]);
            }
            false => {
                // There may be none.
                let _ =
                    Command::new("ip").args(["-n", within, "neighbour", "del", &address, "dev", &self.device]).output();
            }
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.namespace]).output();
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let _ = Command::new("ip").args(["netns", "del", &self.namespace]).output();
    }
}
