//go:build linux

// Package netlab gives a test a network of its own: a namespace without a name, which the kernel removes with the last
// process in it, and servers in it for a guest to talk to.
//
// A namespace belongs to a thread. Each Namespace therefore has one goroutine, locked to its thread, that runs what is
// to be done inside: a socket opened there stays in the namespace wherever it is used afterwards, and a process
// started there lives in it.
package netlab

import (
	"errors"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// Namespace is a network namespace with its loopback up and nothing else in it.
type Namespace struct {
	jobs chan func() // nil: the caller's own namespace
	done chan struct{}
}

// Host is the namespace that the test itself runs in.
var Host = &Namespace{}

// New makes a namespace. It needs CAP_SYS_ADMIN.
func New() (*Namespace, error) {
	n := &Namespace{jobs: make(chan func()), done: make(chan struct{})}
	ready := make(chan error, 1)
	go n.run(ready)
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	err := n.SetLink(Link{Name: "lo"})
	if err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// run owns the thread. It never unlocks it, so that the runtime ends the thread, and with it the namespace.
func (n *Namespace) run(ready chan<- error) {
	runtime.LockOSThread()
	defer close(n.done)
	handle, err := netns.New()
	if err == nil {
		err = handle.Close() // the thread itself keeps the namespace
	}
	ready <- err
	if err != nil {
		return
	}
	for job := range n.jobs {
		job()
	}
}

// Close ends the thread. The namespace goes when the last process and socket in it are gone.
func (n *Namespace) Close() {
	if n.jobs != nil {
		close(n.jobs)
		<-n.done
	}
}

// Do runs f inside. It must not wait for anything that itself needs Do.
func (n *Namespace) Do(f func() error) error {
	if n.jobs == nil {
		return f()
	}
	result := make(chan error, 1)
	n.jobs <- func() { result <- f() }
	return <-result
}

// Start starts a command inside. It dies with this process.
func (n *Namespace) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// The signal comes when the thread that forked ends: that of a Namespace lives until Close.
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	if n.jobs == nil {
		n = hostThread()
	}
	return n.Do(cmd.Start)
}

// hostThread is a thread in Host that never ends. Others may: those that were a Namespace's, or were locked to a goroutine elsewhere.
var hostThread = sync.OnceValue(func() *Namespace {
	n := &Namespace{jobs: make(chan func())}
	go func() {
		runtime.LockOSThread()
		for job := range n.jobs {
			job()
		}
	}()
	return n
})

// Link says how an interface is to be.
type Link struct {
	Name  string
	Wait  time.Duration // for it to appear
	Addrs []string      // CIDR
	MTU   int           // 0: as it is
}

// SetLink configures an interface inside and sets it up.
func (n *Namespace) SetLink(l Link) error {
	err := n.Do(func() error { return setLink(l) })
	if err != nil {
		return fmt.Errorf("link %s: %w", l.Name, err)
	}
	return nil
}

func setLink(l Link) error {
	link, err := netlink.LinkByName(l.Name)
	for end := time.Now().Add(l.Wait); err != nil && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		link, err = netlink.LinkByName(l.Name)
	}
	if err != nil {
		return err
	}
	if l.MTU != 0 {
		if err := netlink.LinkSetMTU(link, l.MTU); err != nil {
			return fmt.Errorf("mtu %d: %w", l.MTU, err)
		}
	}
	for _, cidr := range l.Addrs {
		addr, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		if addr.IP.To4() == nil {
			addr.Flags = syscall.IFA_F_NODAD
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("address %s: %w", cidr, err)
		}
	}
	return netlink.LinkSetUp(link)
}

// Stats returns an interface's counters.
func (n *Namespace) Stats(name string) (stats netlink.LinkStatistics, err error) {
	err = n.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if link.Attrs().Statistics == nil {
			return errors.New("no counters")
		}
		stats = *link.Attrs().Statistics
		return nil
	})
	return stats, err
}

func (n *Namespace) listenTCP(addr string) (l net.Listener, err error) {
	err = n.Do(func() error {
		l, err = net.Listen("tcp", addr)
		return err
	})
	return l, err
}
