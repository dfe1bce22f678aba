//go:build linux

// The demo boots a Linux guest in QEMU whose network card is vhostd, and shows what the guest gets: an address, a
// ping, a download. Nothing of it has any privilege: started by root, it gives root up for vhostd and for QEMU.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vhostd/vhostd/test/vm/daemon"
	"github.com/vhostd/vhostd/test/vm/machine"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/test/vm/stream"
)

const (
	nobody       = 65534
	downloadSize = 128 << 20
)

func main() {
	vhostd := flag.String("vhostd", "bin/vhostd", "`path` of the vhostd program")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	if err := run(ctx, *vhostd); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo is what the steps share.
type demo struct {
	dir     string
	user    int // 0: the caller's own
	servers *netlab.Servers
	vhostd  *daemon.Daemon
	vm      *machine.Machine
	gateway string
}

func run(ctx context.Context, binary string) (err error) {
	d := &demo{}
	if d.dir, err = os.MkdirTemp("", "vhostd-demo-"); err != nil {
		return err
	}
	defer os.RemoveAll(d.dir)
	if os.Geteuid() == 0 {
		d.user = nobody
		err = errors.Join(os.Chmod(d.dir, 0o755), os.Chown(d.dir, nobody, nobody))
	}
	if err != nil {
		return err
	}
	if d.servers, err = netlab.Host.Serve("127.0.0.1"); err != nil {
		return err
	}
	defer d.servers.Close()
	defer d.end()
	start := time.Now()
	for _, step := range []func(context.Context) error{
		func(ctx context.Context) error { return d.startVhostd(ctx, binary) },
		d.boot, d.address, d.ping, d.download, d.counters,
	} {
		if err := step(ctx); err != nil {
			d.explain()
			return err
		}
	}
	d.end()
	fmt.Printf("\nDone in %.0f s; everything is stopped and removed again.\n", time.Since(start).Seconds())
	return nil
}

func heading(format string, args ...any) { fmt.Printf("\n== "+format+"\n", args...) }

func (d *demo) startVhostd(ctx context.Context, binary string) error {
	heading("vhostd, the network card's back half")
	program := filepath.Join(d.dir, "vhostd")
	if err := copyFile(program, binary, 0o755); err != nil {
		return fmt.Errorf("%w (make build makes it)", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var err error
	d.vhostd, err = daemon.Start(ctx, daemon.Options{Binary: program, Dir: d.dir, Net: "user", User: d.user})
	if err != nil {
		return err
	}
	fmt.Printf("   $ %s\n", strings.ReplaceAll(d.vhostd.CommandLine(), program, binary))
	uid, caps, err := privilege(d.vhostd.PID())
	fmt.Printf("   runs as process %d, user id %s, effective capabilities %s\n", d.vhostd.PID(), uid, caps)
	return err
}

// privilege reads the effective user id and capabilities of a process.
func privilege(pid int) (uid, caps string, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, "Uid:") && len(f) > 2:
			uid = f[2]
		case strings.HasPrefix(line, "CapEff:") && len(f) > 1:
			caps = f[1]
		}
	}
	if caps == "0000000000000000" {
		caps = "none"
	}
	return uid, caps, err
}

func (d *demo) boot(ctx context.Context) error {
	heading("a Linux guest in QEMU")
	assets, err := machine.Prepare(ctx, d.dir, func(format string, args ...any) { fmt.Printf("   "+format+"\n", args...) })
	if err != nil {
		return err
	}
	kernel := filepath.Join(d.dir, "vmlinuz") // where the other user can read it
	if err := copyFile(kernel, assets.Kernel, 0o644); err != nil {
		return err
	}
	assets.Kernel = kernel
	start := time.Now()
	d.vm, err = machine.Start(ctx, machine.Options{Assets: assets, Socket: filepath.Join(d.dir, "vhost.sock"), User: d.user})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	hello, err := d.vm.WaitBoot(ctx, 1)
	if err != nil {
		return err
	}
	fmt.Printf("   Linux %s is up after %.1f s\n", hello.Kernel, time.Since(start).Seconds())
	features, err := d.vm.Features(ctx, "eth0")
	fmt.Printf("   its driver and vhostd agreed on: %s\n", strings.ReplaceAll(features.String(), ",", " "))
	return err
}

func (d *demo) address(ctx context.Context) error {
	heading("the guest asks for an address (DHCP, u-root's client)")
	if _, err := d.vm.Exec(ctx, "dhclient", "-ipv6=false", "-timeout=10", "eth0"); err != nil {
		return err
	}
	l, err := d.vm.Link(ctx, rpc.LinkArgs{Name: "eth0"})
	if err != nil {
		return err
	}
	resolv, err := d.vm.ReadFile(ctx, "/etc/resolv.conf")
	if err != nil {
		return err
	}
	if len(l.Gateways) == 0 {
		return fmt.Errorf("the guest has addresses %v but no default route", l.Addrs)
	}
	d.gateway = l.Gateways[0]
	fmt.Printf("   address %s\n   gateway %s\n   %s\n", strings.Join(l.Addrs, ", "), d.gateway, resolv)
	return nil
}

func (d *demo) ping(ctx context.Context) error {
	heading("ping %s", d.gateway)
	p, err := d.vm.Ping(ctx, rpc.PingArgs{Addr: d.gateway, Size: 56, Count: 5})
	if err != nil {
		return err
	}
	fmt.Printf("   %d of %d answered, round trip %v to %v\n", p.Received, p.Sent, round(p.Fastest), round(p.Slowest))
	if p.Received == 0 {
		return errors.New("no answer")
	}
	return nil
}

func round(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }

func (d *demo) download(ctx context.Context) error {
	heading("HTTP download from a server on this host's loopback")
	url := fmt.Sprintf("http://%s/%d", netlab.At(d.gateway, d.servers.HTTP), downloadSize)
	h, err := d.vm.HTTP(ctx, url)
	if err != nil {
		return err
	}
	if h.Bytes != downloadSize || h.CRC32C != stream.BodyCRC(downloadSize) {
		return fmt.Errorf("GET %s: %d bytes with crc32c %08x, want %d with %08x", url, h.Bytes, h.CRC32C,
			downloadSize, stream.BodyCRC(downloadSize))
	}
	mib := float64(h.Bytes) / (1 << 20)
	fmt.Printf("   GET %s\n   %.0f MiB in %.1f s: %.0f MiB/s (%.0f Mbit/s), checksum right\n", url, mib, h.Elapsed.Seconds(),
		mib/h.Elapsed.Seconds(), float64(h.Bytes)*8/1e6/h.Elapsed.Seconds())
	if strings.Contains(d.vm.CommandLine(), "-accel tcg") {
		fmt.Println("   (the guest's CPU is emulated and bounds the rate: VMTEST_QEMU chooses KVM where there is one)")
	}
	return nil
}

func (d *demo) counters(ctx context.Context) error {
	heading("vhostd's counters: vhostd stats")
	text, err := d.vhostd.StatsText(ctx)
	if err != nil {
		return err
	}
	for line := range strings.Lines(text) {
		fmt.Print("   ", line)
	}
	return nil
}

// explain shows what the programs wrote, after a step failed.
func (d *demo) explain() {
	if d.vhostd != nil {
		fmt.Fprintf(os.Stderr, "\nvhostd wrote:\n%s\n", strings.Join(d.vhostd.Log(), "\n"))
	}
	if d.vm != nil {
		fmt.Fprintf(os.Stderr, "\nguest console:\n%s\n", strings.Join(d.vm.Console(), "\n"))
	}
}

// end stops the guest, then vhostd. It may be called twice.
func (d *demo) end() {
	if d.vm != nil {
		d.vm.Close()
	}
	if d.vhostd != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := d.vhostd.Stop(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "demo:", err)
		}
	}
	d.vm, d.vhostd = nil, nil
}

func copyFile(to, from string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
