//go:build linux

package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vhostd/vhostd/test/vm/daemon"
	"github.com/vhostd/vhostd/test/vm/machine"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/test/vm/stream"
)

// The tap, and the addresses of its two ends.
const (
	tapName = "vtap0"
	hostIP  = "10.88.0.1"
	guestIP = "10.88.0.2"
)

// bootTime is how long a guest may take, transferTime a transfer; they end a hang.
const (
	bootTime     = 3 * time.Minute
	transferTime = 10 * time.Minute
)

// side is one guest with its back-end.
type side struct {
	name    string
	ns      *netlab.Namespace
	servers *netlab.Servers
	daemon  *daemon.Daemon // nil: the back-end is QEMU's own
	vm      *machine.Machine
	clocks  *clocks
}

// boot makes a side: QEMU alone when binary is "". After an error there is one still, to be closed, unless it is nil.
func boot(ctx context.Context, name, binary, dir string, assets machine.Assets, o options) (*side, error) {
	ctx, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	ns, err := netlab.New()
	if err != nil {
		return nil, err
	}
	s := &side{name: name, ns: ns}
	if s.servers, err = ns.Serve(""); err != nil {
		return s, err
	}
	m := machine.Options{Assets: assets, Name: name, Timeout: time.Hour}
	if o.props != "" {
		m.DeviceProps = strings.Split(o.props, ",")
	}
	vhostd := 0
	if binary != "" {
		if err := s.startDaemon(ctx, binary, filepath.Join(dir, name), o.net); err != nil {
			return s, err
		}
		m.Socket, vhostd = filepath.Join(dir, name, filepath.Base(daemon.Options{}.Socket())), s.daemon.PID()
	} else {
		m.Netdev = "tap,id=n0,script=no,downscript=no,ifname=" + tapName
	}
	err = ns.Do(func() (err error) {
		s.vm, err = machine.Start(ctx, m)
		return err
	})
	if err != nil {
		return s, err
	}
	if err := s.configure(ctx, o.mtu); err != nil {
		return s, err
	}
	s.clocks, err = newClocks(ctx, s.vm, vhostd)
	return s, err
}

func (s *side) startDaemon(ctx context.Context, binary, dir, options string) (err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if binary, err = filepath.Abs(binary); err != nil {
		return err
	}
	net := "tap:" + tapName
	if options != "" {
		net += "," + options
	}
	s.daemon, err = daemon.Start(ctx, daemon.Options{Binary: binary, Dir: dir, Net: net, Namespace: s.ns})
	return err
}

// configure waits for the guest and gives both ends their addresses.
func (s *side) configure(ctx context.Context, mtu int) error {
	link := netlab.Link{Name: tapName, Wait: 20 * time.Second, MTU: mtu, Addrs: []string{hostIP + "/24"}}
	if err := s.ns.SetLink(link); err != nil {
		return err
	}
	hello, err := s.vm.WaitBoot(ctx, 1)
	if err != nil {
		return err
	}
	_, err = s.vm.Link(ctx, rpc.LinkArgs{Name: "eth0", Wait: 20 * time.Second, Up: true, MTU: mtu, Addrs: []string{guestIP + "/24"}})
	if err != nil {
		return err
	}
	features, err := s.vm.Features(ctx, "eth0")
	log.Printf("%s: Linux %s, %v", s.name, hello.Kernel, features)
	return err
}

// transfer moves bytes over one connection, checked at both ends.
func (s *side) transfer(ctx context.Context, mode stream.Mode, bytes, seed uint64) (sample, error) {
	ctx, cancel := context.WithTimeout(ctx, transferTime)
	defer cancel()
	before, err := s.clocks.read()
	if err != nil {
		return sample{}, err
	}
	res, err := s.vm.TCP(ctx, rpc.TCPArgs{Addr: netlab.At(hostIP, s.servers.Stream), Bytes: bytes, Mode: mode, Seed: seed, Timeout: transferTime})
	if err != nil {
		return sample{}, err
	}
	if res.Bytes != bytes {
		return sample{}, fmt.Errorf("%d bytes arrived, want %d", res.Bytes, bytes)
	}
	after, err := s.clocks.read()
	return after.since(before), err
}

// explain prints the counters of vhostd's queues, which tell how it worked.
func (s *side) explain(ctx context.Context) error {
	if s.daemon == nil {
		return nil
	}
	st, err := s.daemon.Stats(ctx)
	if err != nil {
		return err
	}
	for _, q := range st.Queues {
		if q.Frames > 0 {
			log.Printf("vhostd: queue %d %s: %d frames, %d bytes, %d kicks, %d calls, %d waits", q.Index, q.Direction, q.Frames, q.Bytes, q.Kicks, q.Calls, q.Waits)
		}
	}
	return nil
}

// close ends everything that there is.
func (s *side) close() {
	if s.vm != nil {
		s.vm.Close()
	}
	if s.daemon != nil {
		s.daemon.Kill()
	}
	if s.servers != nil {
		s.servers.Close()
	}
	s.ns.Close()
}
